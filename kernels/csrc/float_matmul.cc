#include "float_matmul.h"

#include <algorithm>
#include <vector>

#include "divide.h"
#include "float_mode.h"
#include "threads.h"

namespace bitnet {
namespace {

constexpr int64_t kPackedFloats = int64_t{2} << 20;     // of an operand, packed at a time: 8 MiB, shared by all threads
constexpr int64_t kPackedColumns = 2048;                // at most, rows of b ...
constexpr int64_t kPackedRows = 2048;                   // ... and of a
constexpr int64_t kItemRows = 96;                       // rows of a, in a work item: 96 KiB for a chain, in L2
constexpr int64_t kItemsPerThread = 4;
constexpr int64_t kSerialProducts = int64_t{1} << 18;

// A part of the product whose operands are packed: rows [row, row_end) of a times rows [column, column_end) of b over
// the inputs [begin, end).
struct Part {
  int64_t row, row_end;
  int64_t column, column_end;
  int64_t begin, end;

  int64_t inputs() const { return end - begin; }
};

// a where it can be read as it is: contiguous inputs, and all rows of a tile.
bool in_place(const FloatMatmulKernels& kernels, const FloatMatmul& p, int64_t row) {
  return p.a.step == 1 && row + kernels.rows <= p.m;
}

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
        const bool direct = in_place(kernels, p, i);
        const float* a = direct ? p.a.at(i, begin) : packed_a + (i - part.row) * part.inputs() + offset * kernels.rows;
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
  static thread_local std::vector<float> kept_a, kept_b;  // from call to call: fresh pages would be faulted in
  std::vector<float>&packed_a = kept_a, &packed_b = kept_b;  // of the caller: a thread_local in the lambdas would be that of the thread that runs them
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
  const int64_t widest = std::max(std::min(p.n, kPackedColumns), std::min(p.m, kPackedRows));
  const int64_t longest = std::max<int64_t>(1, kPackedFloats / widest / kChain) * kChain;
  const auto pack_b = [&](const Part& part, int64_t panel) {
    const int64_t column = part.column + panel * columns;
    kernels.pack_columns(p.b, column, std::min(columns, p.n - column), part.begin, part.end,
                         packed_b.data() + panel * columns * part.inputs());
  };
  // A work item packs by chains, so that the lines that hold a few rows of a tile each are still in cache for the next tile.
  const int64_t item_rows = round_up(kItemRows, rows);
  const auto pack_a = [&](const Part& part, int64_t item) {
    const int64_t chains = divide_up(part.inputs(), kChain), first = part.row + item / chains * item_rows;
    const int64_t begin = part.begin + item % chains * kChain, end = std::min(part.end, begin + kChain);
    for (int64_t row = first; row < std::min(part.row_end, first + item_rows); row += rows) {
      if (in_place(kernels, p, row)) continue;
      float* const to = packed_a.data() + (row - part.row) * part.inputs() + (begin - part.begin) * rows;
      kernels.pack_rows(p.a, row, std::min(rows, p.m - row), begin, end, to);
    }
  };
  const auto multiply_all = [&](const Part& part, bool with_b) {
    const int64_t panels = divide_up(part.column_end - part.column, columns);
    const int64_t a_items = divide_up(part.row_end - part.row, item_rows) * divide_up(part.inputs(), kChain);
    packed_a.resize(round_up(part.row_end - part.row, rows) * part.inputs());
    packed_b.resize(panels * columns * part.inputs());
    const int64_t b_items = with_b ? panels : 0;
    loop(a_items + b_items, [&](int64_t item) { item < b_items ? pack_b(part, item) : pack_a(part, item - b_items); });
    const int64_t row_blocks = divide_up(part.row_end - part.row, item_rows);
    const int64_t pieces = std::min(panels, divide_up(kItemsPerThread * thread_count(), row_blocks));
    const int64_t step = divide_up(panels, pieces) * columns, runs = divide_up(panels * columns, step);
    loop(row_blocks * runs, [&](int64_t item) {
      const int64_t row = part.row + item / runs * item_rows, column = part.column + item % runs * step;
      multiply(kernels, p, part, row, std::min(part.row_end, row + item_rows), column,
               std::min(part.column_end, column + step), packed_a.data(), packed_b.data());
    });
  };
  for (int64_t column = 0; column < p.n; column += kPackedColumns) {
    for (int64_t begin = 0; begin < p.k; begin += longest) {
      for (int64_t row = 0; row < p.m; row += round_up(kPackedRows, rows)) {
        multiply_all({row, std::min(p.m, row + round_up(kPackedRows, rows)), column,
                      std::min(p.n, column + kPackedColumns), begin, std::min(p.k, begin + longest)},
                     row == 0);
      }
    }
  }
}

}  // namespace bitnet
