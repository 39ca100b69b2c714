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

  BITNET_TARGET static void pack_rows(const Operand<float>& a, int64_t row, int64_t count, int64_t begin, int64_t end,
                                      float* to) {
    if (count == kRows && a.row_stride == 1) {
      for (int64_t i = begin; i < end; ++i, to += kRows) std::memcpy(to, a.at(row, i), kRows * sizeof(float));
    } else {
      pack_some(a, row, count, begin, end, kRows, to);
    }
  }

  // Any layout, and fewer rows than a tile has.
  template <typename T>
  BITNET_INLINE static void pack_some(const Operand<T>& x, int64_t row, int64_t count, int64_t begin, int64_t end,
                                      int64_t width, float* to) {
    for (int64_t i = begin; i < end; ++i, to += width) {
      const T* from = x.at(row, i);
      for (int64_t r = 0; r < count; ++r) to[r] = static_cast<float>(from[r * x.row_stride]);
      for (int64_t r = count; r < width; ++r) to[r] = 0.0f;
    }
  }

  BITNET_INLINE static Vec load(const float* x) { return Lanes::load(x); }
  BITNET_INLINE static Vec load(const int8_t* x) { return Lanes::load_int8(x); }

  template <typename T>
  BITNET_INLINE static void pack(const Operand<T>& b, int64_t row, int64_t count, int64_t begin, int64_t end, float* to) {
    if (count == kColumns && b.row_stride == 1) {
      for (int64_t i = begin; i < end; ++i, to += kColumns) {
        const T* from = b.at(row, i);
        BITNET_UNROLL
        for (int v = 0; v < kVectors; ++v) Lanes::store(to + v * kLanes, load(from + v * kLanes));
      }
    } else {
      pack_some(b, row, count, begin, end, kColumns, to);
    }
  }

  BITNET_TARGET static void pack_columns(const FloatsOrCodes& b, int64_t row, int64_t count, int64_t begin, int64_t end,
                                         float* to) {
    if (b.codes.data != nullptr) {
      pack(b.codes, row, count, begin, end, to);
    } else {
      pack(b.floats, row, count, begin, end, to);
    }
  }

  static constexpr FloatMatmulKernels kernels() { return {kRows, kColumns, tile, pack_rows, pack_columns}; }
};

}  // namespace
}  // namespace bitnet

#endif  // BITNET_KERNELS_FLOAT_MATMUL_LOOPS_H_
