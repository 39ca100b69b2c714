// 16 floats with AVX-512 F: one register.
// float_lanes.h lists the operations.

#ifndef BITNET_KERNELS_FLOAT_LANES_AVX512_H_
#define BITNET_KERNELS_FLOAT_LANES_AVX512_H_

#include <immintrin.h>

#include <cstdint>

#define BITNET_TARGET __attribute__((target("avx512f")))
#include "float_lanes.h"

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // false positives of gcc 12 in its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace bitnet {
namespace {

struct Avx512Lanes {
  using Vec = __m512;
  using Part = __m512;
  static constexpr int kParts = 1;

  BITNET_INLINE static Vec load(const float* x) { return _mm512_loadu_ps(x); }
  BITNET_INLINE static void store(float* x, Vec a) { _mm512_storeu_ps(x, a); }
  BITNET_INLINE static Vec set1(float x) { return _mm512_set1_ps(x); }
  BITNET_INLINE static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  BITNET_INLINE static Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  BITNET_INLINE static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  BITNET_INLINE static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  BITNET_INLINE static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  BITNET_INLINE static Vec select_less(Vec a, Vec b, Vec x, Vec y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
  }
  BITNET_INLINE static Vec load_bfloat16(const uint16_t* x) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  BITNET_INLINE static Vec load_int8(const int8_t* x) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
  }
  BITNET_INLINE static Vec add_to_exponent(Vec y, Vec t) {
    const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(t), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(y), power));
  }
  BITNET_INLINE static float first(Vec a) { return _mm512_cvtss_f32(a); }
  BITNET_INLINE static float sum_of(Vec a) {
    a = add(a, _mm512_shuffle_f32x4(a, a, 0x4e));
    a = add(a, _mm512_shuffle_f32x4(a, a, 0xb1));
    a = add(a, _mm512_permute_ps(a, 0x4e));
    return first(add(a, _mm512_permute_ps(a, 0xb1)));
  }
  BITNET_INLINE static float max_of(Vec a) {
    a = max(a, _mm512_shuffle_f32x4(a, a, 0x4e));
    a = max(a, _mm512_shuffle_f32x4(a, a, 0xb1));
    a = max(a, _mm512_permute_ps(a, 0x4e));
    return first(max(a, _mm512_permute_ps(a, 0xb1)));
  }

  BITNET_INLINE static void transpose(Vec x[4]) {
    const Vec a = _mm512_shuffle_f32x4(x[0], x[1], 0x44), b = _mm512_shuffle_f32x4(x[2], x[3], 0x44);
    const Vec c = _mm512_shuffle_f32x4(x[0], x[1], 0xee), d = _mm512_shuffle_f32x4(x[2], x[3], 0xee);
    x[0] = _mm512_shuffle_f32x4(a, b, 0x88);
    x[1] = _mm512_shuffle_f32x4(a, b, 0xdd);
    x[2] = _mm512_shuffle_f32x4(c, d, 0x88);
    x[3] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }

  BITNET_INLINE static Part load_part(const float* x) { return load(x); }
  BITNET_INLINE static void store_part(float* x, Part a) { store(x, a); }
  BITNET_INLINE static Part set1_part(float x) { return set1(x); }
  BITNET_INLINE static Part fma_part(Part a, Part b, Part c) { return fma(a, b, c); }
  BITNET_INLINE static Part repeat4(const float* x) { return _mm512_broadcast_f32x4(_mm_loadu_ps(x)); }
  BITNET_INLINE static __m512 pairs(Part a, Part b) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  BITNET_INLINE static Part sum4(const Part a[4]) {
    const Part x = pairs(a[0], a[1]), y = pairs(a[2], a[3]);
    return add(_mm512_shuffle_ps(x, y, 0x88), _mm512_shuffle_ps(x, y, 0xdd));
  }
};

}  // namespace
}  // namespace bitnet

#endif  // BITNET_KERNELS_FLOAT_LANES_AVX512_H_
