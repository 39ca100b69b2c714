// AVX2 with FMA, which every processor with AVX2 has: 16 lanes are two vectors.

#if defined(__x86_64__)

#include <immintrin.h>

#define HEAD_TARGET __attribute__((target("avx2,fma")))
#include "head_rows.h"

namespace bitnet {
namespace {

struct Avx2Lanes {
  static constexpr int kStreams = 4;
  static constexpr int kRows = 2;  // 8 accumulators, 4 widened weights, 2 inputs of 16 registers
  static constexpr int kXRows = 2;
  __m256 low, high;

  HEAD_INLINE static Avx2Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  HEAD_INLINE static Avx2Lanes load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
  HEAD_INLINE static Avx2Lanes widen(const uint16_t* w) { return {widen8(w), widen8(w + 8)}; }
  HEAD_INLINE static Avx2Lanes fma(const Avx2Lanes& a, const Avx2Lanes& b, const Avx2Lanes& c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  HEAD_INLINE float sum() const {
    const __m256 eight = _mm256_add_ps(low, high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  HEAD_INLINE static __m256 widen8(const uint16_t* w) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
};

}  // namespace

HeadRows head_rows_avx2() { return head_rows<Avx2Lanes>; }

}  // namespace bitnet

#endif  // __x86_64__
