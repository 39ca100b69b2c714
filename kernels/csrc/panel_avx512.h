// AVX-512 with VNNI: vpdpbusd multiplies 64 unsigned fields with 64 signed activations and adds groups of four to
// 16 int32 lanes, exactly for every int8 value.

#ifndef BITNET_KERNELS_PANEL_AVX512_H_
#define BITNET_KERNELS_PANEL_AVX512_H_

#include <immintrin.h>

#include "panel_fields.h"
#include "scaled_matmul.h"

namespace bitnet {

// Compiled in integer_matmul_avx512vnni.cc, also for the instruction sets that extend this one.
void matmul_avx512vnni(const Problem& p, int64_t begin, int64_t end);
void scaled_avx512vnni(const Problem& p, const MatmulScales& s, float* out, int64_t begin, int64_t end, float* scratch);

namespace {

struct Avx512Vnni {
  using Bytes = __m512i;
  using Sums = __m512i;
  using Floats = __m512;
  static constexpr int kLanes = 16;
  // At most 16 of the 32 registers, 20 for ternary5, are accumulators of four panels.
  static constexpr int slots(Format format, int rows) {
    if (format == Format::kTernary5) return rows == 1 ? 5 : 1;
    return std::min(fields(format), rows == 1 ? 4 : rows == 2 ? 2 : 1);
  }
  static constexpr int kStreams = 4;
  static constexpr int kFusedRows = 4;
  static constexpr int few_rows(Format) { return 12; }
  static constexpr int kTilePanels = 4, kTileRows = 6;
  static constexpr int64_t partial_limit(Format) { return 0; }
  static constexpr int32_t offset(Format format) { return bitnet::offset(format); }

  static BITNET_INLINE Bytes load(const void* source) {
    Bytes bytes = _mm512_loadu_si512(source);
    asm("" : "+v"(bytes));  // one load: gcc 12 would fold it into every use
    return bytes;
  }
  static BITNET_INLINE Bytes broadcast(const int8_t* x) {
    int32_t dword;
    std::memcpy(&dword, x, 4);
    return _mm512_set1_epi32(dword);
  }
  static BITNET_INLINE Bytes splat(int byte) { return _mm512_set1_epi8(static_cast<char>(byte)); }
  static BITNET_INLINE Bytes bit_and(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
  static BITNET_INLINE Bytes min(Bytes a, Bytes b) { return _mm512_min_epu8(a, b); }
  static BITNET_INLINE Bytes subtract(Bytes a, Bytes b) { return _mm512_sub_epi8(a, b); }
  // Bits of a neighbouring byte come in at the top; a mask follows.
  template <int kBits>
  static BITNET_INLINE Bytes shift_right(Bytes bytes) {
    return _mm512_srli_epi16(bytes, kBits);
  }
  static BITNET_INLINE Bytes look_up(const uint8_t* table, Bytes indices) {
    const __m128i entries = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), indices);
  }
  template <Format>
  static BITNET_INLINE Sums dot(Sums sums, Bytes fields, Bytes x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(fields), "v"(x));  // gcc 12 copies sums around the intrinsic
    return sums;
  }
  template <Format>
  static BITNET_INLINE Sums finish(Sums sums) {
    return sums;
  }
  static BITNET_INLINE Sums zero() { return _mm512_setzero_si512(); }
  static BITNET_INLINE Sums fill(int32_t sum) { return _mm512_set1_epi32(sum); }
  static BITNET_INLINE Sums add(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
  template <int kScale>
  static BITNET_INLINE Sums divide(Sums sums) {
    if constexpr (kScale == 1) {
      return sums;
    } else if constexpr (kScale % 2 == 0) {
      return divide<kScale / 2>(_mm512_srai_epi32(sums, 1));
    } else {
      return _mm512_mullo_epi32(sums, _mm512_set1_epi32(inverse(kScale)));
    }
  }
  static BITNET_INLINE Sums load_sums(const int32_t* source) { return _mm512_loadu_si512(source); }
  static BITNET_INLINE void store(int32_t* target, Sums sums) { _mm512_storeu_si512(target, sums); }
  static BITNET_INLINE Floats to_floats(Sums sums) { return _mm512_cvtepi32_ps(sums); }
  static BITNET_INLINE Floats load_floats(const float* source) { return _mm512_loadu_ps(source); }
  static BITNET_INLINE Floats splat_float(float value) { return _mm512_set1_ps(value); }
  static BITNET_INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static BITNET_INLINE Floats add_floats(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static BITNET_INLINE void store_floats(float* target, Floats values) { _mm512_storeu_ps(target, values); }
};

}  // namespace
}  // namespace bitnet

#endif  // BITNET_KERNELS_PANEL_AVX512_H_
