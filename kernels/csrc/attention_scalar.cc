// Plain C++: the lanes are a loop. std::fma is one rounding by its definition, however the processor comes to it.

#include <algorithm>
#include <cmath>

#define BITNET_TARGET

#include "attention_loops.h"

namespace bitnet {
namespace {

struct ScalarLanes {
  struct Vec {
    float lane[kLanes];
  };
  using Part = Vec;
  static constexpr int kParts = 1, kScoreRows = 1, kMixVectors = 1;

  template <typename F>
  static Vec each(F f) {
    Vec result;
    for (int64_t i = 0; i < kLanes; ++i) result.lane[i] = f(i);
    return result;
  }
  static float max(float a, float b) { return a > b ? a : b; }
  static uint32_t bits(float a) {
    uint32_t result;
    std::memcpy(&result, &a, 4);
    return result;
  }
  static float from_bits(uint32_t a) {
    float result;
    std::memcpy(&result, &a, 4);
    return result;
  }

  static Vec load(const float* x) {
    return each([&](int64_t i) { return x[i]; });
  }
  static void store(float* x, Vec a) { std::memcpy(x, a.lane, sizeof(a.lane)); }
  static Vec set1(float x) {
    return each([&](int64_t) { return x; });
  }
  static Vec add(Vec a, Vec b) {
    return each([&](int64_t i) { return a.lane[i] + b.lane[i]; });
  }
  static Vec sub(Vec a, Vec b) {
    return each([&](int64_t i) { return a.lane[i] - b.lane[i]; });
  }
  static Vec mul(Vec a, Vec b) {
    return each([&](int64_t i) { return a.lane[i] * b.lane[i]; });
  }
  static Vec fma(Vec a, Vec b, Vec c) {
    return each([&](int64_t i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
  }
  static Vec max(Vec a, Vec b) {
    return each([&](int64_t i) { return max(a.lane[i], b.lane[i]); });
  }
  static Vec where_less(Vec a, Vec b, Vec x, Vec y) {
    return each([&](int64_t i) { return a.lane[i] < b.lane[i] ? x.lane[i] : y.lane[i]; });
  }
  static Vec load_bfloat16(const uint16_t* x) {
    return each([&](int64_t i) { return from_bits(uint32_t{x[i]} << 16); });
  }
  static Vec load_int8(const int8_t* x) {
    return each([&](int64_t i) { return static_cast<float>(x[i]); });
  }
  static Vec times_power(Vec y, Vec t) {
    return each([&](int64_t i) { return from_bits(bits(y.lane[i]) + (bits(t.lane[i]) << 23)); });
  }
  static float first(Vec a) { return a.lane[0]; }
  static float sum_of(Vec a) {
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) a.lane[i] += a.lane[i + half];
    }
    return a.lane[0];
  }
  static float max_of(Vec a) {
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) a.lane[i] = max(a.lane[i], a.lane[i + half]);
    }
    return a.lane[0];
  }
  static void transpose(Vec x[4]) {
    for (int64_t i = 0; i < 4; ++i) {
      for (int64_t j = 0; j < i; ++j) std::swap_ranges(x[i].lane + 4 * j, x[i].lane + 4 * j + 4, x[j].lane + 4 * i);
    }
  }

  static Part load_part(const float* x) { return load(x); }
  static void store_part(float* x, Part a) { store(x, a); }
  static Part set1_part(float x) { return set1(x); }
  static Part fma_part(Part a, Part b, Part c) { return fma(a, b, c); }
  static Part repeat4(const float* x) {
    return each([&](int64_t i) { return x[i % 4]; });
  }
  static Part sum4(const Part a[4]) {
    return each([&](int64_t i) {
      const float* quarter = a[i % 4].lane + i / 4 * 4;
      return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
    });
  }
};

}  // namespace

const AttentionKernels kScalarAttention = {"scalar", Loops<ScalarLanes>::chunk, Loops<ScalarLanes>::merge};

}  // namespace bitnet
