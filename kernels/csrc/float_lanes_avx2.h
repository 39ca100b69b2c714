// 16 floats with AVX2 and FMA: two registers, lanes 0-7 and 8-15.
// float_lanes.h lists the operations.

#ifndef BITNET_KERNELS_FLOAT_LANES_AVX2_H_
#define BITNET_KERNELS_FLOAT_LANES_AVX2_H_

#include <immintrin.h>

#include <cstdint>

#define BITNET_TARGET __attribute__((target("avx2,fma")))
#include "float_lanes.h"

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // false positives of gcc 12 in its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace bitnet {
namespace {

struct Avx2Lanes {
  struct Vec {
    __m256 low, high;
  };
  using Part = __m256;
  static constexpr int kParts = 2;

  BITNET_INLINE static Vec load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
  BITNET_INLINE static void store(float* x, Vec a) { _mm256_storeu_ps(x, a.low), _mm256_storeu_ps(x + 8, a.high); }
  BITNET_INLINE static Vec set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  BITNET_INLINE static Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
  BITNET_INLINE static Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
  BITNET_INLINE static Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
  BITNET_INLINE static Vec fma(Vec a, Vec b, Vec c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  BITNET_INLINE static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
  BITNET_INLINE static Vec select_less(Vec a, Vec b, Vec x, Vec y) {
    return {_mm256_blendv_ps(y.low, x.low, _mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ)),
            _mm256_blendv_ps(y.high, x.high, _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ))};
  }
  BITNET_INLINE static __m256 widen(const uint16_t* x) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  BITNET_INLINE static Vec load_bfloat16(const uint16_t* x) { return {widen(x), widen(x + 8)}; }
  BITNET_INLINE static __m256 widen(const int8_t* x) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  }
  BITNET_INLINE static Vec load_int8(const int8_t* x) { return {widen(x), widen(x + 8)}; }
  BITNET_INLINE static __m256 add_to_exponent(__m256 y, __m256 t) {
    const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), power));
  }
  BITNET_INLINE static Vec add_to_exponent(Vec y, Vec t) {
    return {add_to_exponent(y.low, t.low), add_to_exponent(y.high, t.high)};
  }
  BITNET_INLINE static float first(Vec a) { return _mm256_cvtss_f32(a.low); }

  BITNET_INLINE static float sum_of(Vec a) {
    const __m256 half = _mm256_add_ps(a.low, a.high);
    __m128 sums = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    sums = _mm_add_ps(sums, _mm_movehl_ps(sums, sums));
    return _mm_cvtss_f32(_mm_add_ss(sums, _mm_movehdup_ps(sums)));
  }
  BITNET_INLINE static float max_of(Vec a) {
    const __m256 half = _mm256_max_ps(a.low, a.high);
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
  }
  BITNET_INLINE static void transpose(Vec x[4]) {
    const Vec a = x[0], b = x[1], c = x[2], d = x[3];
    x[0] = {_mm256_permute2f128_ps(a.low, b.low, 0x20), _mm256_permute2f128_ps(c.low, d.low, 0x20)};
    x[1] = {_mm256_permute2f128_ps(a.low, b.low, 0x31), _mm256_permute2f128_ps(c.low, d.low, 0x31)};
    x[2] = {_mm256_permute2f128_ps(a.high, b.high, 0x20), _mm256_permute2f128_ps(c.high, d.high, 0x20)};
    x[3] = {_mm256_permute2f128_ps(a.high, b.high, 0x31), _mm256_permute2f128_ps(c.high, d.high, 0x31)};
  }

  BITNET_INLINE static Part load_part(const float* x) { return _mm256_loadu_ps(x); }
  BITNET_INLINE static void store_part(float* x, Part a) { _mm256_storeu_ps(x, a); }
  BITNET_INLINE static Part set1_part(float x) { return _mm256_set1_ps(x); }
  BITNET_INLINE static Part fma_part(Part a, Part b, Part c) { return _mm256_fmadd_ps(a, b, c); }
  BITNET_INLINE static Part repeat4(const float* x) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x)); }
  BITNET_INLINE static __m256 pairs(Part a, Part b) {
    const __m256d x = _mm256_castps_pd(a), y = _mm256_castps_pd(b);
    return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
  }
  BITNET_INLINE static Part sum4(const Part a[4]) {
    const Part x = pairs(a[0], a[1]), y = pairs(a[2], a[3]);
    return _mm256_add_ps(_mm256_shuffle_ps(x, y, 0x88), _mm256_shuffle_ps(x, y, 0xdd));
  }
};

}  // namespace
}  // namespace bitnet

#endif  // BITNET_KERNELS_FLOAT_LANES_AVX2_H_
