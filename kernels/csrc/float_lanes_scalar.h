// 16 floats in plain C++: the lanes are a loop. std::fma rounds once by definition, with or without an instruction.
// float_lanes.h lists the operations.

#ifndef BITNET_KERNELS_FLOAT_LANES_SCALAR_H_
#define BITNET_KERNELS_FLOAT_LANES_SCALAR_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define BITNET_TARGET
#include "float_lanes.h"

namespace bitnet {
namespace {

struct ScalarLanes {
  struct Vec {
    float lane[kLanes];
  };
  using Part = Vec;
  static constexpr int kParts = 1;

  template <typename F>
  BITNET_INLINE static Vec each(F f) {
    Vec result;
    for (int64_t i = 0; i < kLanes; ++i) result.lane[i] = f(i);
    return result;
  }
  BITNET_INLINE static float max(float a, float b) { return a > b ? a : b; }
  BITNET_INLINE static uint32_t bits(float a) {
    uint32_t result;
    std::memcpy(&result, &a, 4);
    return result;
  }
  BITNET_INLINE static float from_bits(uint32_t a) {
    float result;
    std::memcpy(&result, &a, 4);
    return result;
  }

  BITNET_INLINE static Vec load(const float* x) {
    return each([&](int64_t i) { return x[i]; });
  }
  BITNET_INLINE static void store(float* x, Vec a) { std::memcpy(x, a.lane, sizeof(a.lane)); }
  BITNET_INLINE static Vec set1(float x) {
    return each([&](int64_t) { return x; });
  }
  BITNET_INLINE static Vec add(Vec a, Vec b) {
    return each([&](int64_t i) { return a.lane[i] + b.lane[i]; });
  }
  BITNET_INLINE static Vec sub(Vec a, Vec b) {
    return each([&](int64_t i) { return a.lane[i] - b.lane[i]; });
  }
  BITNET_INLINE static Vec mul(Vec a, Vec b) {
    return each([&](int64_t i) { return a.lane[i] * b.lane[i]; });
  }
  BITNET_INLINE static Vec fma(Vec a, Vec b, Vec c) {
    return each([&](int64_t i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
  }
  BITNET_INLINE static Vec max(Vec a, Vec b) {
    return each([&](int64_t i) { return max(a.lane[i], b.lane[i]); });
  }
  BITNET_INLINE static Vec select_less(Vec a, Vec b, Vec x, Vec y) {
    return each([&](int64_t i) { return a.lane[i] < b.lane[i] ? x.lane[i] : y.lane[i]; });
  }
  BITNET_INLINE static Vec load_bfloat16(const uint16_t* x) {
    return each([&](int64_t i) { return from_bits(uint32_t{x[i]} << 16); });
  }
  BITNET_INLINE static Vec load_int8(const int8_t* x) {
    return each([&](int64_t i) { return static_cast<float>(x[i]); });
  }
  BITNET_INLINE static Vec add_to_exponent(Vec y, Vec t) {
    return each([&](int64_t i) { return from_bits(bits(y.lane[i]) + (bits(t.lane[i]) << 23)); });
  }
  BITNET_INLINE static float first(Vec a) { return a.lane[0]; }
  BITNET_INLINE static float sum_of(Vec a) {
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) a.lane[i] += a.lane[i + half];
    }
    return a.lane[0];
  }
  BITNET_INLINE static float max_of(Vec a) {
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) a.lane[i] = max(a.lane[i], a.lane[i + half]);
    }
    return a.lane[0];
  }
  BITNET_INLINE static void transpose(Vec x[4]) {
    for (int64_t i = 0; i < 4; ++i) {
      for (int64_t j = 0; j < i; ++j) std::swap_ranges(x[i].lane + 4 * j, x[i].lane + 4 * j + 4, x[j].lane + 4 * i);
    }
  }

  BITNET_INLINE static Part load_part(const float* x) { return load(x); }
  BITNET_INLINE static void store_part(float* x, Part a) { store(x, a); }
  BITNET_INLINE static Part set1_part(float x) { return set1(x); }
  BITNET_INLINE static Part fma_part(Part a, Part b, Part c) { return fma(a, b, c); }
  BITNET_INLINE static Part repeat4(const float* x) {
    return each([&](int64_t i) { return x[i % 4]; });
  }
  BITNET_INLINE static Part sum4(const Part a[4]) {
    return each([&](int64_t i) {
      const float* quarter = a[i % 4].lane + i / 4 * 4;
      return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
    });
  }
};

}  // namespace
}  // namespace bitnet

#endif  // BITNET_KERNELS_FLOAT_LANES_SCALAR_H_
