// AVX2 with FMA: a vector is two registers, lanes 0-7 and 8-15.

#if defined(__x86_64__)

#include <immintrin.h>

#define BITNET_TARGET __attribute__((target("avx2,fma")))

#include "attention_loops.h"

namespace bitnet {
namespace {

struct Avx2Lanes {
  struct Vec {
    __m256 low, high;
  };
  static constexpr int kScoreRows = 2, kScoreKeys = 2, kMixVectors = 1;  // 16 registers

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
  BITNET_INLINE static Vec where_less(Vec a, Vec b, Vec x, Vec y) {
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
  BITNET_INLINE static __m256 times_power(__m256 y, __m256 t) {
    const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), power));
  }
  BITNET_INLINE static Vec times_power(Vec y, Vec t) {
    return {times_power(y.low, t.low), times_power(y.high, t.high)};
  }
  BITNET_INLINE static float first(Vec a) { return _mm256_cvtss_f32(a.low); }

  // Lane i plus lanes i + 8, i + 4 and i + 12.
  BITNET_INLINE static __m128 quarter(Vec a) {
    const __m256 half = _mm256_add_ps(a.low, a.high);
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  BITNET_INLINE static float sum_of(Vec a) {
    __m128 sums = quarter(a);
    sums = _mm_add_ps(sums, _mm_movehl_ps(sums, sums));
    return _mm_cvtss_f32(_mm_add_ss(sums, _mm_movehdup_ps(sums)));
  }
  BITNET_INLINE static float max_of(Vec a) {
    const __m256 half = _mm256_max_ps(a.low, a.high);
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
  }
  BITNET_INLINE static void store_sums(const Vec a[4], float* scores) {
    const __m128 q0 = quarter(a[0]), q1 = quarter(a[1]), q2 = quarter(a[2]), q3 = quarter(a[3]);
    const __m128 above = _mm_add_ps(_mm_movelh_ps(q0, q1), _mm_movehl_ps(q1, q0));
    const __m128 below = _mm_add_ps(_mm_movelh_ps(q2, q3), _mm_movehl_ps(q3, q2));
    const __m128 sums = _mm_add_ps(_mm_shuffle_ps(above, below, 0x88), _mm_shuffle_ps(above, below, 0xdd));
    _mm_storel_pi(reinterpret_cast<__m64*>(scores), sums);
    _mm_storeh_pi(reinterpret_cast<__m64*>(scores + kChunkKeys), sums);
  }
};

}  // namespace

const AttentionKernels kAvx2Attention = {"avx2", Loops<Avx2Lanes>::chunk, Loops<Avx2Lanes>::merge};

}  // namespace bitnet

#endif  // __x86_64__
