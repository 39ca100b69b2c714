// XLA custom calls of the output head: checks of shapes, splitting over threads, bindings.

#include <algorithm>
#include <string>
#include <string_view>

#include "float_mode.h"
#include "head.h"
#include "isa.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace bitnet {
namespace {

constexpr int64_t kItemBytes = 1 << 20;    // of the table, for few rows of x: long runs read faster
constexpr int64_t kTileBytes = 256 << 10;  // of the table, for many rows of x: stays in L2 ...
constexpr int64_t kTileXRows = 24;         // ... beside so many rows of x
constexpr int64_t kRowStep = 8;            // whole tiles of every instruction set
constexpr int64_t kItemsPerThread = 4;

using Inputs = ffi::Buffer<ffi::F32, 2>;
using Table = ffi::Buffer<ffi::BF16, 2>;
using Logits = ffi::Buffer<ffi::F32, 2>;

ffi::Error invalid(std::string message) { return ffi::Error::InvalidArgument("bitnet_kernels: " + std::move(message)); }

template <typename Buffer>
std::string dims(const Buffer& buffer) {
  std::string text = "[";
  for (int64_t dim : buffer.dimensions()) text += (text.size() > 1 ? ", " : "") + std::to_string(dim);
  return text + "]";
}

// Runs rows(begin, end) over the n rows of a table, on all threads, in pieces of about item_bytes.
template <typename Rows>
void for_rows(int64_t n, int64_t row_bytes, int64_t item_bytes, Rows rows) {
  const int64_t wanted = std::min(item_bytes / row_bytes, n / (thread_count() * kItemsPerThread));
  const int64_t grain = std::max<int64_t>(1, wanted / kRowStep) * kRowStep;
  parallel_for((n + grain - 1) / grain, [=](int64_t item) {
    const IeeeMode ieee;
    rows(item * grain, std::min(n, (item + 1) * grain));
  });
}

ffi::Error logits_call(Inputs x, Table table, std::string_view isa, ffi::Result<Logits> y) {
  const HeadProblem p = {x.dimensions()[0],  table.dimensions()[0], x.dimensions()[1],
                         x.typed_data(), table.typed_data(),    y->typed_data()};
  if (table.dimensions()[1] != p.k || y->dimensions()[0] != p.m || y->dimensions()[1] != p.n) {
    return invalid("expected x[m, k], table[n, k] and y[m, n]; got x" + dims(x) + ", table" + dims(table) + ", y" +
                   dims(*y));
  }
  if (p.k < 1) return invalid("expected at least one input; got x" + dims(x));
  const HeadRows head_rows = find_kernels(isa) == nullptr ? nullptr : find_head_rows(isa);
  if (head_rows == nullptr) {
    return invalid("isa=" + std::string(isa) + " is not available; expected one of " + bitnet_kernels_available_isas());
  }
  const bool few = p.m < kRowStep;
  for_rows(p.n, 2 * p.k, few ? kItemBytes : kTileBytes, [=](int64_t begin, int64_t end) {
    HeadProblem part = p;
    for (int64_t row = 0; row < p.m; row += kTileXRows) {
      part.m = std::min(kTileXRows, p.m - row);
      part.x = p.inputs(row);
      part.y = p.output(row, 0);
      head_rows(part, begin, end);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace bitnet

XLA_FFI_DEFINE_HANDLER_SYMBOL(bitnet_kernels_bfloat16_logits, bitnet::logits_call,
                              ffi::Ffi::Bind()
                                  .Arg<bitnet::Inputs>()  // x [m, k]
                                  .Arg<bitnet::Table>()   // table [n, k]
                                  .Attr<std::string_view>("isa")
                                  .Ret<bitnet::Logits>());  // y [m, n]
