// The loops of float_matmul.h for any Lanes (float_lanes.h) with the tile shape
//
//   kProductRows, kProductVectors    rows of a and vectors of b whose sums fit into registers together

#ifndef BITNET_KERNELS_FLOAT_MATMUL_LOOPS_H_
#define BITNET_KERNELS_FLOAT_MATMUL_LOOPS_H_

#include <cstring>

#include "float_lanes.h"
#include "float_matmul.h"

namespace bitnet {
namespace {

template <typename Lanes>
struct FloatMatmulLoops {
  static constexpr int kRows = Lanes::kProductRows, kVectors = Lanes::kProductVectors;
  static constexpr int64_t kColumns = kVectors * kLanes;
  using Vec = typename Lanes::Vec;

  BITNET_TARGET static void tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t k, float* c,
                                 int64_t c_stride, bool add) {
    Vec sums[kRows][kVectors];
    BITNET_UNROLL
    for (int r = 0; r < kRows; ++r) {
      BITNET_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[r][v] = Lanes::set1(0.0f);
    }
    BITNET_UNROLL
    for (int r = 0; r < kRows; ++r) {  // whose lines arrive while the sums are made
      __builtin_prefetch(c + r * c_stride, 1);
      __builtin_prefetch(c + r * c_stride + kColumns - 1, 1);
    }
    for (int64_t i = 0; i < k; ++i, a += a_step, b += kColumns) {
      Vec columns[kVectors];
      BITNET_UNROLL
      for (int v = 0; v < kVectors; ++v) columns[v] = Lanes::load(b + v * kLanes);
      BITNET_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const Vec row = Lanes::set1(a[r * a_row]);
        BITNET_UNROLL
        for (int v = 0; v < kVectors; ++v) sums[r][v] = Lanes::fma(row, columns[v], sums[r][v]);
      }
    }
    BITNET_UNROLL
    for (int r = 0; r < kRows; ++r) {
      BITNET_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        float* to = c + r * c_stride + v * kLanes;
        Lanes::store(to, add ? Lanes::add(Lanes::load(to), sums[r][v]) : sums[r][v]);
      }
    }
  }

  BITNET_INLINE static Vec load(const float* x) { return Lanes::load(x); }
  BITNET_INLINE static Vec load(const int8_t* x) { return Lanes::load_int8(x); }

  // Where rows are contiguous, all of them are read for an input before the next: memory is read in order, once.
  template <int64_t kWidth, typename T>
  BITNET_INLINE static void pack(const Operand<T>& x, int64_t row, int64_t count, int64_t begin, int64_t end, float* to,
                                 int64_t tile_stride) {
    const int64_t whole = x.row_stride == 1 ? count / kWidth : 0;
    if (whole > 0) {
      for (int64_t i = begin; i < end; ++i) {
        const T* from = x.at(row, i);
        float* tile = to + (i - begin) * kWidth;
        for (int64_t t = 0; t < whole; ++t, from += kWidth, tile += tile_stride) {
          if constexpr (kWidth % kLanes == 0) {
            BITNET_UNROLL
            for (int v = 0; v < kWidth / kLanes; ++v) Lanes::store(tile + v * kLanes, load(from + v * kLanes));
          } else {
            std::memcpy(tile, from, kWidth * sizeof(float));
          }
        }
      }
    }
    for (int64_t t = whole; t * kWidth < count; ++t) {
      const int64_t some = count - t * kWidth < kWidth ? count - t * kWidth : kWidth;
      float* tile = to + t * tile_stride;
      for (int64_t i = begin; i < end; ++i, tile += kWidth) {
        const T* from = x.at(row + t * kWidth, i);
        for (int64_t r = 0; r < some; ++r) tile[r] = static_cast<float>(from[r * x.row_stride]);
        for (int64_t r = some; r < kWidth; ++r) tile[r] = 0.0f;
      }
    }
  }

  BITNET_TARGET static void pack_rows(const Operand<float>& a, int64_t row, int64_t count, int64_t begin, int64_t end,
                                      float* to, int64_t tile_stride) {
    pack<kRows>(a, row, count, begin, end, to, tile_stride);
  }

  BITNET_TARGET static void pack_columns(const FloatsOrCodes& b, int64_t row, int64_t count, int64_t begin, int64_t end,
                                         float* to, int64_t tile_stride) {
    if (b.codes.data != nullptr) {
      pack<kColumns>(b.codes, row, count, begin, end, to, tile_stride);
    } else {
      pack<kColumns>(b.floats, row, count, begin, end, to, tile_stride);
    }
  }

  static constexpr FloatMatmulKernels kernels() { return {kRows, kColumns, tile, pack_rows, pack_columns}; }
};

}  // namespace
}  // namespace bitnet

#endif  // BITNET_KERNELS_FLOAT_MATMUL_LOOPS_H_
