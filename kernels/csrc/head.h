// Logits of an output head whose weights are bfloat16, on raw pointers.
//
// Every instruction set gives the same bits for a row of x and a row of the table, whatever the number of rows of
// either and the thread that computes them. The order of the operations is fixed:
//
//   lane j of 16 sums the inputs j, j + 16, j + 32, ... in this order, each with one fused multiply-add that starts
//   from zero; inputs are padded with zeros to a multiple of 16;
//   then lanes j and j + 8 are added, then j and j + 4, j + 2, j + 1.
//
// A bfloat16 is the high half of a float32, so a shift widens it and the products are exact before the sum is rounded.

#ifndef BITNET_KERNELS_HEAD_H_
#define BITNET_KERNELS_HEAD_H_

#include <cstdint>

namespace bitnet {

constexpr int64_t kHeadLanes = 16;

struct HeadProblem {
  int64_t m;              // rows of x
  int64_t n;              // rows of the table
  int64_t k;              // inputs
  const float* x;         // [m, k]
  const uint16_t* table;  // [n, k]
  float* y;               // [m, n]

  const float* inputs(int64_t row) const { return x + row * k; }
  const uint16_t* weights(int64_t row) const { return table + row * k; }
  float* output(int64_t x_row, int64_t table_row) const { return y + x_row * n + table_row; }
};

// Writes y for all rows of x and the rows [begin, end) of the table. Any thread, no allocation. The caller has set
// FloatMode::kIeee (float_mode.h): flushing of denormal numbers would differ between threads.
using HeadRows = void (*)(const HeadProblem&, int64_t begin, int64_t end);

}  // namespace bitnet

#endif  // BITNET_KERNELS_HEAD_H_
