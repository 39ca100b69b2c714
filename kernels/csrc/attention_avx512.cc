// AVX-512: a vector is a register; the sums of 16 registers of scores leave as one.

#if defined(__x86_64__)

#include <immintrin.h>

#define BITNET_TARGET __attribute__((target("avx512f")))

#include "attention_loops.h"

namespace bitnet {
namespace {

struct Avx512Lanes {
  using Vec = __m512;
  static constexpr int kScoreRows = 4, kScoreKeys = 4, kMixVectors = 4;

  BITNET_INLINE static Vec load(const float* x) { return _mm512_loadu_ps(x); }
  BITNET_INLINE static void store(float* x, Vec a) { _mm512_storeu_ps(x, a); }
  BITNET_INLINE static Vec set1(float x) { return _mm512_set1_ps(x); }
  BITNET_INLINE static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  BITNET_INLINE static Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  BITNET_INLINE static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  BITNET_INLINE static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  BITNET_INLINE static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  BITNET_INLINE static Vec where_less(Vec a, Vec b, Vec x, Vec y) {
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
  BITNET_INLINE static Vec times_power(Vec y, Vec t) {
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

  // The sums of the lanes of 16 vectors. Each step adds the halves of two vectors and keeps both results in one.
  BITNET_INLINE static void store_sums(const Vec a[16], float* scores) {
    Vec b[8], c[4], d[2];
    BITNET_UNROLL
    for (int i = 0; i < 8; ++i) {  // quarters: vector j, j, j + 4, j + 4
      const int j = i / 4 * 8 + i % 4;
      b[i] = add(_mm512_shuffle_f32x4(a[j], a[j + 4], 0x44), _mm512_shuffle_f32x4(a[j], a[j + 4], 0xee));
    }
    BITNET_UNROLL
    for (int i = 0; i < 4; ++i) {  // quarters: vector i, i + 4, i + 8, i + 12
      c[i] = add(_mm512_shuffle_f32x4(b[i], b[i + 4], 0x88), _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd));
    }
    BITNET_UNROLL
    for (int i = 0; i < 2; ++i) {  // lanes of a quarter: vector 2 i, 2 i, 2 i + 1, 2 i + 1
      const __m512d even = _mm512_castps_pd(c[2 * i]), odd = _mm512_castps_pd(c[2 * i + 1]);
      d[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)), _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
    }
    const Vec sums = add(_mm512_shuffle_ps(d[0], d[1], 0x88), _mm512_shuffle_ps(d[0], d[1], 0xdd));
    _mm_storeu_ps(scores, _mm512_castps512_ps128(sums));
    _mm_storeu_ps(scores + kChunkKeys, _mm512_extractf32x4_ps(sums, 1));
    _mm_storeu_ps(scores + 2 * kChunkKeys, _mm512_extractf32x4_ps(sums, 2));
    _mm_storeu_ps(scores + 3 * kChunkKeys, _mm512_extractf32x4_ps(sums, 3));
  }
};

}  // namespace

const AttentionKernels kAvx512Attention = {"avx512", Loops<Avx512Lanes>::chunk, Loops<Avx512Lanes>::merge};

}  // namespace bitnet

#endif  // __x86_64__
