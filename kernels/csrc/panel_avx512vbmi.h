// AVX-512 with VNNI and VBMI: a table look-up unpacks the digits of ternary5; other formats run the code of panel_avx512.h.

#ifndef BITNET_KERNELS_PANEL_AVX512VBMI_H_
#define BITNET_KERNELS_PANEL_AVX512VBMI_H_

#include "panel_avx512.h"

namespace bitnet {

// Compiled in integer_matmul_avx512vbmi.cc, also for the instruction sets that extend this one.
void matmul_avx512vbmi(const Problem& p, int64_t begin, int64_t end);
void scaled_avx512vbmi(const Problem& p, const MatmulScales& s, float* out, int64_t begin, int64_t end, float* scratch);

namespace {

struct Avx512Vbmi : Avx512Vnni {};

// Byte i is the digits of i to the base 3, two bits each, the lowest at the bottom.
struct DigitTable {
  alignas(64) uint8_t bytes[128] = {};
  constexpr DigitTable() {
    for (int i = 0; i < 81; ++i) bytes[i] = static_cast<uint8_t>(i % 3 | i / 3 % 3 << 2 | i / 9 % 3 << 4 | i / 27 << 6);
  }
};

// One table look-up turns the four lower digits into two-bit fields; the highest digit stays in place.
template <int kSlots>
struct Fields<Avx512Vbmi, Format::kTernary5, kSlots> {
  static constexpr int scale(int slot) { return slot == 4 ? 81 : power(4, slot); }

  Fields<Avx512Vbmi, Format::kTernary2, kSlots == 1 ? 1 : 4> lower;
  __m512i highest;

  BITNET_INLINE void start(__m512i packed) {
    static constexpr DigitTable kTable;
    const __m512i once = _mm512_min_epu8(packed, _mm512_sub_epi8(packed, _mm512_set1_epi8(81)));
    const __m512i rest = _mm512_min_epu8(once, _mm512_sub_epi8(once, _mm512_set1_epi8(81)));
    highest = _mm512_sub_epi8(packed, rest);
    const __m512i low = _mm512_load_si512(kTable.bytes), high = _mm512_load_si512(kTable.bytes + 64);
    lower.start(_mm512_permutex2var_epi8(low, rest, high));
  }

  template <int s>
  BITNET_INLINE __m512i take() {
    if constexpr (s < 4) {
      return lower.template take<s>();
    } else if constexpr (kSlots == 5) {
      return highest;
    } else {  // 0, 81, 162 to 0, 1, 2
      return _mm512_and_si512(_mm512_srli_epi16(highest, 6), _mm512_set1_epi8(3));
    }
  }
};

}  // namespace
}  // namespace bitnet

#endif  // BITNET_KERNELS_PANEL_AVX512VBMI_H_
