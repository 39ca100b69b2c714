#include "packed_product.h"

#include <algorithm>
#include <cstring>

#include "lookahead.h"
#include "threads.h"

namespace bitnet {
namespace {

// Work below which one thread is as fast as two: a helper takes up to a microsecond to start.
constexpr int64_t kSerialBytes = 32 << 10;               // packed bytes, one or two rows of x
constexpr int64_t kSerialProducts = int64_t{1} << 20;    // products, several rows of x
constexpr int64_t kFewRows = 12;                         // rows of x up to which a product is limited by memory
constexpr int64_t kItemBytes = 300 << 10;                // packed bytes of a work item, few rows of x, approximately
constexpr int64_t kTableItems = 4;                       // least work items per thread where rows share tables ...
constexpr int64_t kMinPanels = 16, kMaxPanels = 112;     // ... and the panels of such an item

// How a product is split into work items: `rows` rows of x times `panels` panels.
struct Split {
  int64_t rows;
  int64_t panels = 4;  // of the tiles of several rows
  int64_t items;

  Split(const Problem& p, TableRows table_rows) : rows(p.m) {
    if (const int64_t together = table_rows == nullptr ? 0 : table_rows(p)) {
      rows = divide_up(p.m, 4 * divide_up(p.m, together)) * 4;
      const int64_t pieces = std::max(divide_up(p.panels(), kMaxPanels),
                                      divide_up(kTableItems * thread_count(), divide_up(p.m, rows)));
      panels = std::max(kMinPanels, divide_up(p.panels(), 8 * pieces) * 8);
    } else if (p.m <= kFewRows) {
      // The same number of items for every thread, of whole groups of panels that are multiplied in step.
      const int64_t share = p.panels() * p.panel_bytes() / thread_count();
      const int64_t pieces = thread_count() * std::max<int64_t>(1, (share + kItemBytes / 2) / kItemBytes);
      panels = divide_up(p.panels(), kMaxStreams * pieces) * kMaxStreams;
    }
    items = divide_up(p.m, rows) * divide_up(p.panels(), panels);
  }
};

}  // namespace

void Rows::prepare(const int8_t* codes, int64_t k, int64_t stride, const MatmulKernels& kernels, Problem& p) {
  const int64_t inputs = k / p.groups, padded_inputs = p.x_stride / p.groups;
  p.x = codes;
  if (p.x_stride != stride) {
    padded.assign(p.m * p.x_stride, 0);
    for (int64_t i = 0; i < p.m; ++i) {
      for (int64_t g = 0; g < p.groups; ++g) {
        std::memcpy(padded.data() + i * p.x_stride + g * padded_inputs, codes + i * stride + g * inputs, inputs);
      }
    }
    p.x = padded.data();
  }
  sums.resize(p.m * p.groups);
  for (int64_t i = 0; i < p.m * p.groups; ++i) sums[i] = kernels.sum(p.x + i * padded_inputs, padded_inputs);
  p.x_sums = sums.data();
}

void run(const std::vector<Problem>& problems, TableRows table_rows, const Work& work) {
  std::vector<Split> splits;
  int64_t items = 0, bytes = 0, products = 0;
  for (const Problem& p : problems) {
    splits.emplace_back(p, table_rows);
    items += splits.back().items;
    bytes += p.panels() * p.panel_bytes();
    products += p.m * p.n * p.x_stride;
  }
  const auto run_item = [&](int64_t item) {
    size_t i = 0;
    for (; item >= splits[i].items; ++i) item -= splits[i].items;
    const Split& split = splits[i];
    const int64_t runs = divide_up(problems[i].panels(), split.panels);
    const int64_t row = item / runs * split.rows, begin = item % runs * split.panels;
    Problem part = problems[i];
    part.m = std::min(split.rows, part.m - row);
    part.x += row * part.x_stride;
    part.x_sums += row * part.groups;
    work(i, part, row, begin, std::min(begin + split.panels, part.panels()));
  };
  if (problems[0].m <= 2 ? bytes < kSerialBytes : products < kSerialProducts) {  // two: the digits of one row
    for (int64_t item = 0; item < items; ++item) run_item(item);
    return;
  }
  Weights next;
  if (problems[0].m <= kFewRows) {  // else multiplying takes longer than reading
    Weights call;
    for (const Problem& p : problems) call.add(p.w, p.panels() * p.panel_bytes());
    next = expected_after(call);
  }
  parallel_for(items, run_item, next);
}

}  // namespace bitnet
