// The loop over rows of a bfloat16 head, for any vector of 16 floats. A file per instruction set defines HEAD_TARGET
// and such a vector, includes this, and names head_rows<Lanes>.
//
// Lanes has zero(), load(const float*), widen(const uint16_t*), fma(a, b, c) = a * b + c with one rounding, sum();
// kRows and kXRows, rows of the table and of x whose sums fit into registers together, for many rows of x; and
// kStreams, rows of the table for one row of x.

#ifndef BITNET_KERNELS_HEAD_ROWS_H_
#define BITNET_KERNELS_HEAD_ROWS_H_

#include <cstring>

#include "head.h"

#define HEAD_INLINE HEAD_TARGET inline __attribute__((always_inline))

// Before a loop over accumulators: they stay in registers only where the loop is unrolled whole.
#if defined(__clang__)
#define HEAD_UNROLL _Pragma("clang loop unroll(full)")
#else
#define HEAD_UNROLL _Pragma("GCC unroll 16")
#endif

namespace bitnet {
namespace {

template <class Lanes, int kRows, int kXRows>
HEAD_INLINE void multiply_add(Lanes (&sums)[kXRows][kRows], const float* x, int64_t x_stride, const uint16_t* w,
                              int64_t w_stride) {
  Lanes weights[kRows];
  HEAD_UNROLL for (int r = 0; r < kRows; ++r) weights[r] = Lanes::widen(w + r * w_stride);
  HEAD_UNROLL for (int i = 0; i < kXRows; ++i) {
    const Lanes inputs = Lanes::load(x + i * x_stride);
    HEAD_UNROLL for (int r = 0; r < kRows; ++r) sums[i][r] = Lanes::fma(inputs, weights[r], sums[i][r]);
  }
}

// Rows row, row + stride, ... of the table times kXRows neighbouring rows of x.
template <class Lanes, int kRows, int kXRows>
HEAD_TARGET void tile(const HeadProblem& p, int64_t x_row, int64_t row, int64_t stride) {
  Lanes sums[kXRows][kRows];
  HEAD_UNROLL for (int i = 0; i < kXRows; ++i) {
    HEAD_UNROLL for (int r = 0; r < kRows; ++r) sums[i][r] = Lanes::zero();
  }
  const float* x = p.inputs(x_row);
  const uint16_t* w = p.weights(row);
  const int64_t whole = p.k / kHeadLanes * kHeadLanes;
  for (int64_t c = 0; c < whole; c += kHeadLanes) {
    multiply_add<Lanes, kRows, kXRows>(sums, x + c, p.k, w + c, stride * p.k);
  }
  if (whole < p.k) {
    float x_end[kXRows * kHeadLanes] = {};
    uint16_t w_end[kRows * kHeadLanes] = {};
    for (int i = 0; i < kXRows; ++i) {
      std::memcpy(x_end + i * kHeadLanes, x + i * p.k + whole, (p.k - whole) * sizeof(float));
    }
    for (int r = 0; r < kRows; ++r) {
      std::memcpy(w_end + r * kHeadLanes, w + r * stride * p.k + whole, (p.k - whole) * sizeof(uint16_t));
    }
    multiply_add<Lanes, kRows, kXRows>(sums, x_end, kHeadLanes, w_end, kHeadLanes);
  }
  HEAD_UNROLL for (int i = 0; i < kXRows; ++i) {
    HEAD_UNROLL for (int r = 0; r < kRows; ++r) *p.output(x_row + i, row + r * stride) = sums[i][r].sum();
  }
}

template <class Lanes, int kRows, int kXRows>
HEAD_INLINE void all_inputs(const HeadProblem& p, int64_t row, int64_t stride) {
  int64_t i = 0;
  for (; i + kXRows <= p.m; i += kXRows) tile<Lanes, kRows, kXRows>(p, i, row, stride);
  for (; i < p.m; ++i) tile<Lanes, kRows, 1>(p, i, row, stride);
}

// The rows are cut into kRows runs that are walked in step: long sequential streams, which memory serves fastest.
template <class Lanes, int kRows, int kXRows>
HEAD_INLINE void walk(const HeadProblem& p, int64_t begin, int64_t end) {
  const int64_t run = (end - begin) / kRows;
  for (int64_t row = begin; row < begin + run; ++row) all_inputs<Lanes, kRows, kXRows>(p, row, run);
  for (int64_t row = begin + run * kRows; row < end; ++row) all_inputs<Lanes, 1, kXRows>(p, row, 1);
}

template <class Lanes>
HEAD_TARGET void head_rows(const HeadProblem& p, int64_t begin, int64_t end) {
  if (p.m < Lanes::kXRows) {
    walk<Lanes, Lanes::kStreams, 1>(p, begin, end);
  } else {
    walk<Lanes, Lanes::kRows, Lanes::kXRows>(p, begin, end);
  }
}

}  // namespace
}  // namespace bitnet

#endif  // BITNET_KERNELS_HEAD_ROWS_H_
