// The loops over the rows of a bfloat16 head, for any Lanes (float_lanes.h) with the tile shapes
//
//   kHeadRows, kHeadXRows    rows of the table and of x whose sums fit into registers together, for many rows of x
//   kHeadStreams             rows of the table that one row of x is multiplied with in step

#ifndef BITNET_KERNELS_HEAD_LOOPS_H_
#define BITNET_KERNELS_HEAD_LOOPS_H_

#include <cstring>

#include "float_lanes.h"
#include "head.h"

namespace bitnet {
namespace {

static_assert(kHeadLanes == kLanes);

template <typename Lanes, int kRows, int kXRows>
BITNET_INLINE void multiply_add(typename Lanes::Vec (&sums)[kXRows][kRows], const float* x, int64_t x_stride,
                                const uint16_t* w, int64_t w_stride) {
  typename Lanes::Vec weights[kRows];
  BITNET_UNROLL
  for (int r = 0; r < kRows; ++r) weights[r] = Lanes::load_bfloat16(w + r * w_stride);
  BITNET_UNROLL
  for (int i = 0; i < kXRows; ++i) {
    const typename Lanes::Vec inputs = Lanes::load(x + i * x_stride);
    BITNET_UNROLL
    for (int r = 0; r < kRows; ++r) sums[i][r] = Lanes::fma(inputs, weights[r], sums[i][r]);
  }
}

// Rows row, row + stride, ... of the table times kXRows neighbouring rows of x.
template <typename Lanes, int kRows, int kXRows>
BITNET_TARGET void tile(const HeadProblem& p, int64_t x_row, int64_t row, int64_t stride) {
  typename Lanes::Vec sums[kXRows][kRows];
  BITNET_UNROLL
  for (int i = 0; i < kXRows; ++i) {
    BITNET_UNROLL
    for (int r = 0; r < kRows; ++r) sums[i][r] = Lanes::set1(0.0f);
  }
  const float* x = p.inputs(x_row);
  const uint16_t* w = p.weights(row);
  const int64_t whole = p.k / kLanes * kLanes;
  for (int64_t c = 0; c < whole; c += kLanes) {
    multiply_add<Lanes, kRows, kXRows>(sums, x + c, p.k, w + c, stride * p.k);
  }
  if (whole < p.k) {
    float x_end[kXRows * kLanes] = {};
    uint16_t w_end[kRows * kLanes] = {};
    for (int i = 0; i < kXRows; ++i) {
      std::memcpy(x_end + i * kLanes, x + i * p.k + whole, (p.k - whole) * sizeof(float));
    }
    for (int r = 0; r < kRows; ++r) {
      std::memcpy(w_end + r * kLanes, w + r * stride * p.k + whole, (p.k - whole) * sizeof(uint16_t));
    }
    multiply_add<Lanes, kRows, kXRows>(sums, x_end, kLanes, w_end, kLanes);
  }
  BITNET_UNROLL
  for (int i = 0; i < kXRows; ++i) {
    BITNET_UNROLL
    for (int r = 0; r < kRows; ++r) *p.output(x_row + i, row + r * stride) = Lanes::sum_of(sums[i][r]);
  }
}

template <typename Lanes, int kRows, int kXRows>
BITNET_INLINE void all_inputs(const HeadProblem& p, int64_t row, int64_t stride) {
  int64_t i = 0;
  for (; i + kXRows <= p.m; i += kXRows) tile<Lanes, kRows, kXRows>(p, i, row, stride);
  for (; i < p.m; ++i) tile<Lanes, kRows, 1>(p, i, row, stride);
}

// The rows are cut into kRows runs that are walked in step: long sequential streams, which memory serves fastest.
template <typename Lanes, int kRows, int kXRows>
BITNET_INLINE void walk(const HeadProblem& p, int64_t begin, int64_t end) {
  const int64_t run = (end - begin) / kRows;
  for (int64_t row = begin; row < begin + run; ++row) all_inputs<Lanes, kRows, kXRows>(p, row, run);
  for (int64_t row = begin + run * kRows; row < end; ++row) all_inputs<Lanes, 1, kXRows>(p, row, 1);
}

template <typename Lanes>
BITNET_TARGET void head_rows(const HeadProblem& p, int64_t begin, int64_t end) {
  if (p.m < Lanes::kHeadXRows) {
    walk<Lanes, Lanes::kHeadStreams, 1>(p, begin, end);
  } else {
    walk<Lanes, Lanes::kHeadRows, Lanes::kHeadXRows>(p, begin, end);
  }
}

}  // namespace
}  // namespace bitnet

#endif  // BITNET_KERNELS_HEAD_LOOPS_H_
