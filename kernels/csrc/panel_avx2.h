// AVX2: vpmaddubsw multiplies 32 unsigned fields with 32 signed activations and adds pairs to 16 int16, exactly for all
// fields but those of int8. The int16 sums are widened before they can overflow.

#ifndef BITNET_KERNELS_PANEL_AVX2_H_
#define BITNET_KERNELS_PANEL_AVX2_H_

#include <immintrin.h>

#include "panel_fields.h"

namespace bitnet {
namespace {

struct Avx2 {
  using Bytes = __m256i;
  using Sums = __m256i;
  using Floats = __m256;
  static constexpr int kLanes = 8;
  static constexpr int slots(Format format, int rows) {
    if (rows > 1) return 1;
    return format == Format::kBinary || format == Format::kTernary2 ? 2 : 1;  // of sixteen registers
  }
  static constexpr int kStreams = 2;
  static constexpr int kFusedRows = 2;
  static constexpr int few_rows(Format format) { return format == Format::kTernary5 ? 4 : 12; }
  static constexpr int kTilePanels = 1, kTileRows = 6;
  static constexpr int64_t partial_limit(Format format) { return format == Format::kInt8 ? 0 : 1 << 15; }
  static constexpr int32_t offset(Format format) { return bitnet::offset(format); }

  static BITNET_INLINE Bytes load(const void* source) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(source));
  }
  static BITNET_INLINE Bytes broadcast(const int8_t* x) {
    int32_t dword;
    std::memcpy(&dword, x, 4);
    return _mm256_set1_epi32(dword);
  }
  static BITNET_INLINE Bytes splat(int byte) { return _mm256_set1_epi8(static_cast<char>(byte)); }
  static BITNET_INLINE Bytes bit_and(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
  static BITNET_INLINE Bytes min(Bytes a, Bytes b) { return _mm256_min_epu8(a, b); }
  static BITNET_INLINE Bytes subtract(Bytes a, Bytes b) { return _mm256_sub_epi8(a, b); }
  // Bits of a neighbouring byte come in at the top; a mask follows.
  template <int kBits>
  static BITNET_INLINE Bytes shift_right(Bytes bytes) {
    return _mm256_srli_epi16(bytes, kBits);
  }
  static BITNET_INLINE Bytes look_up(const uint8_t* table, Bytes indices) {
    const __m128i entries = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), indices);
  }
  // Pairs of int8 products need more than int16: the nibbles of fields are multiplied one by one, and widened at once.
  template <Format kFormat>
  static BITNET_INLINE Sums dot(Sums sums, Bytes fields, Bytes x) {
    if constexpr (kFormat == Format::kInt8) {
      const __m256i low = _mm256_maddubs_epi16(bit_and(fields, splat(15)), x);
      const __m256i high = _mm256_maddubs_epi16(bit_and(shift_right<4>(fields), splat(15)), x);
      const __m256i wide = _mm256_add_epi32(_mm256_madd_epi16(low, _mm256_set1_epi16(1)),
                                            _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
      return _mm256_add_epi32(sums, wide);
    } else {
      // Left to itself gcc multiplies for all rows before it adds for the first, which spills the accumulators of a tile,
      // or copies each sum before it adds.
      asm("vpaddw %1, %0, %0" : "+x"(sums) : "x"(_mm256_maddubs_epi16(fields, x)));
      return sums;
    }
  }
  template <Format kFormat>
  static BITNET_INLINE Sums finish(Sums sums) {
    return kFormat == Format::kInt8 ? sums : _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
  }
  static BITNET_INLINE Sums zero() { return _mm256_setzero_si256(); }
  static BITNET_INLINE Sums fill(int32_t sum) { return _mm256_set1_epi32(sum); }
  static BITNET_INLINE Sums add(Sums a, Sums b) { return _mm256_add_epi32(a, b); }
  template <int kScale>
  static BITNET_INLINE Sums divide(Sums sums) {
    if constexpr (kScale == 1) {
      return sums;
    } else if constexpr (kScale % 2 == 0) {
      return divide<kScale / 2>(_mm256_srai_epi32(sums, 1));
    } else {
      return _mm256_mullo_epi32(sums, _mm256_set1_epi32(inverse(kScale)));
    }
  }
  static BITNET_INLINE Sums load_sums(const int32_t* source) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  }
  static BITNET_INLINE void store(int32_t* target, Sums sums) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), sums);
  }
  static BITNET_INLINE Floats to_floats(Sums sums) { return _mm256_cvtepi32_ps(sums); }
  static BITNET_INLINE Floats load_floats(const float* source) { return _mm256_loadu_ps(source); }
  static BITNET_INLINE Floats splat_float(float value) { return _mm256_set1_ps(value); }
  static BITNET_INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static BITNET_INLINE Floats add_floats(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static BITNET_INLINE void store_floats(float* target, Floats values) { _mm256_storeu_ps(target, values); }
};

}  // namespace
}  // namespace bitnet

#endif  // BITNET_KERNELS_PANEL_AVX2_H_
