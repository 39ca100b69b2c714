// AVX-512 F: 16 lanes are a vector.

#if defined(__x86_64__)

#include <immintrin.h>

#define HEAD_TARGET __attribute__((target("avx512f")))
#include "head_rows.h"

namespace bitnet {
namespace {

// Vector types and no intrinsics where gcc 12 warns inside those (of an undefined value that no lane takes).
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(64)));

struct Avx512Lanes {
  static constexpr int kStreams = 8;
  static constexpr int kRows = 4;  // 24 accumulators, 4 widened weights, an input of 32 registers
  static constexpr int kXRows = 6;
  __m512 v;

  HEAD_INLINE static Avx512Lanes zero() { return {_mm512_setzero_ps()}; }
  HEAD_INLINE static Avx512Lanes load(const float* x) { return {_mm512_loadu_ps(x)}; }
  HEAD_INLINE static Avx512Lanes widen(const uint16_t* w) {
    Halves halves;
    std::memcpy(&halves, w, sizeof(halves));
    return {(__m512)(__builtin_convertvector(halves, Words) << 16)};
  }
  HEAD_INLINE static Avx512Lanes fma(const Avx512Lanes& a, const Avx512Lanes& b, const Avx512Lanes& c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
  }
  HEAD_INLINE float sum() const {
    alignas(64) float lanes[kHeadLanes];
    _mm512_store_ps(lanes, v);
    const __m256 eight = _mm256_add_ps(_mm256_load_ps(lanes), _mm256_load_ps(lanes + 8));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

}  // namespace

HeadRows head_rows_avx512() { return head_rows<Avx512Lanes>; }

}  // namespace bitnet

#endif  // __x86_64__
