#include "float_matmul.h"

#include <algorithm>
#include <vector>

#include "divide.h"
#include "float_mode.h"
#include "threads.h"

namespace bitnet {
namespace {

constexpr int64_t kItemRows = 96;                       // rows of a, in a work item: 96 KiB for a chain, in L2
constexpr int64_t kItemInputs = 64;                     // in a work item that packs
constexpr int64_t kItemsPerThread = 4;
constexpr int64_t kSerialProducts = int64_t{1} << 18;

// How much is packed at a time, shared by all threads: inputs times the wider operand, rows of b, rows of a.
struct Limits {
  int64_t floats, columns, rows;
};
constexpr Limits kOnlyB = {int64_t{2} << 20, 2048, 2048};  // 8 MiB: sums go to c once, not once for every part
constexpr Limits kBoth = {int64_t{1} << 17, 512, 512};     // 512 KiB each, still in L2 when they are read

// A part of the product whose operands are packed: rows [row, row_end) of a times rows [column, column_end) of b over
// the inputs [begin, end).
struct Part {
  int64_t row, row_end;
  int64_t packed_row;  // the rows of a before it are read where they are
  int64_t column, column_end;
  int64_t begin, end;

  int64_t inputs() const { return end - begin; }
};

// Rows [row, row_end) of c, in whole tiles but for the last, its columns [column, column_end).
void multiply(const FloatMatmulKernels& kernels, const FloatMatmul& p, const Part& part, int64_t row, int64_t row_end,
              int64_t column, int64_t column_end, const float* packed_a, const float* packed_b) {
  static thread_local std::vector<float> edge;
  edge.resize(kernels.rows * kernels.columns);
  for (int64_t begin = part.begin; begin < part.end; begin += kChain) {
    const int64_t k = std::min(kChain, part.end - begin), offset = begin - part.begin;
    const bool add = begin > 0;
    for (int64_t j = column; j < column_end; j += kernels.columns) {
      const float* b = packed_b + (j - part.column) * part.inputs() + offset * kernels.columns;
      const int64_t width = std::min(kernels.columns, p.n - j);
      for (int64_t i = row; i < row_end; i += kernels.rows) {
        const bool direct = i < part.packed_row;
        const float* a =
            direct ? p.a.at(i, begin) : packed_a + (i - part.packed_row) * part.inputs() + offset * kernels.rows;
        const int64_t a_row = direct ? p.a.row_stride : 1, a_step = direct ? 1 : kernels.rows;
        const int64_t height = std::min(kernels.rows, p.m - i);
        float* const c = p.c + i * p.n + j;
        if (height == kernels.rows && width == kernels.columns) {
          kernels.tile(a, a_row, a_step, b, k, c, p.n, add);
          continue;
        }
        kernels.tile(a, a_row, a_step, b, k, edge.data(), kernels.columns, false);
        for (int64_t r = 0; r < height; ++r) {
          const float* sums = edge.data() + r * kernels.columns;
          for (int64_t l = 0; l < width; ++l) c[r * p.n + l] = add ? c[r * p.n + l] + sums[l] : sums[l];
        }
      }
    }
  }
}

}  // namespace

void float_matmul(const FloatMatmulKernels& kernels, const FloatMatmul& p) {
  if (p.m == 0 || p.n == 0) return;
  if (p.k == 0) {
    std::fill_n(p.c, p.m * p.n, 0.0f);
    return;
  }
  static thread_local std::vector<float> kept_a, kept_b;  // from call to call, never smaller: growing writes zeros
  // The caller's: named in a lambda, a thread_local would be that of the thread that runs the lambda.
  std::vector<float>&packed_a = kept_a, &packed_b = kept_b;
  const uint64_t mode = FloatMode::current();
  const bool serial = p.m * p.n * p.k < kSerialProducts;
  const auto loop = [&](int64_t items, const auto& body) {
    if (serial) {
      for (int64_t item = 0; item < items; ++item) body(item);
    } else {
      parallel_for(items, [&](int64_t item) {
        const FloatMode as_caller(mode);
        body(item);
      });
    }
  };
  const int64_t rows = kernels.rows, columns = kernels.columns;
  const bool in_place = p.a.step == 1;
  const Limits& limits = in_place ? kOnlyB : kBoth;
  const int64_t most_rows = round_up(limits.rows, rows), item_rows = round_up(kItemRows, rows);
  const int64_t widest = std::max(std::min(p.n, limits.columns), std::min(p.m, limits.rows));
  const int64_t longest = std::max<int64_t>(1, limits.floats / widest / kChain) * kChain;
  const auto pack_a = [&](const Part& part, int64_t begin, int64_t end) {
    kernels.pack_rows(p.a, part.packed_row, part.row_end - part.packed_row, begin, end,
                      packed_a.data() + (begin - part.begin) * rows, rows * part.inputs());
  };
  const auto pack_b = [&](const Part& part, int64_t begin, int64_t end) {
    kernels.pack_columns(p.b, part.column, part.column_end - part.column, begin, end,
                         packed_b.data() + (begin - part.begin) * columns, columns * part.inputs());
  };
  const auto grow = [](std::vector<float>& packed, int64_t size) {
    if (static_cast<int64_t>(packed.size()) < size) packed.resize(size);
  };
  const auto multiply_all = [&](const Part& part, bool with_b) {
    const int64_t panels = divide_up(part.column_end - part.column, columns);
    grow(packed_a, round_up(part.row_end - part.packed_row, rows) * part.inputs());
    grow(packed_b, panels * columns * part.inputs());
    const int64_t runs_of_inputs = divide_up(part.inputs(), kItemInputs);
    loop(runs_of_inputs * (with_b ? 2 : 1), [&](int64_t item) {
      const int64_t begin = part.begin + item % runs_of_inputs * kItemInputs;
      const int64_t end = std::min(part.end, begin + kItemInputs);
      item < runs_of_inputs ? pack_a(part, begin, end) : pack_b(part, begin, end);
    });
    const int64_t row_blocks = divide_up(part.row_end - part.row, item_rows);
    const int64_t pieces = std::min(panels, divide_up(kItemsPerThread * thread_count(), row_blocks));
    const int64_t step = divide_up(panels, pieces) * columns, runs = divide_up(panels * columns, step);
    loop(row_blocks * runs, [&](int64_t item) {
      const int64_t row = part.row + item / runs * item_rows, column = part.column + item % runs * step;
      multiply(kernels, p, part, row, std::min(part.row_end, row + item_rows), column,
               std::min(part.column_end, column + step), packed_a.data(), packed_b.data());
    });
  };
  for (int64_t column = 0; column < p.n; column += limits.columns) {
    const int64_t column_end = std::min(p.n, column + limits.columns);
    for (int64_t begin = 0; begin < p.k; begin += longest) {
      const int64_t end = std::min(p.k, begin + longest);
      for (int64_t row = 0; row < p.m; row += most_rows) {
        const int64_t row_end = std::min(p.m, row + most_rows);
        const int64_t packed_row = in_place ? row_end - (row_end - row) % rows : row;  // tiles are read whole
        multiply_all({row, row_end, packed_row, column, column_end, begin, end}, row == 0);
      }
    }
  }
}

}  // namespace bitnet
