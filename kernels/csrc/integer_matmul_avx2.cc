// AVX2: vpmaddubsw multiplies 32 unsigned fields with 32 signed activations and adds pairs into 16 int16 lanes.
// The int16 sums are widened before they can overflow; the bounds below hold for every int8 value, -128 included.

#include "integer_matmul.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#define AVX2 __attribute__((target("avx2")))
#define AVX2_INLINE AVX2 inline __attribute__((always_inline))

namespace bitnet {
namespace {

AVX2_INLINE __m256i load(const void* source) { return _mm256_loadu_si256(static_cast<const __m256i*>(source)); }

AVX2_INLINE __m256i broadcast4(const int8_t* x) {
  int32_t dword;
  std::memcpy(&dword, x, 4);
  return _mm256_set1_epi32(dword);
}

// Adds the pairs of int16 to int32: one lane per row of the matrix.
AVX2_INLINE __m256i widen(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

// y = (first ? -x_sum : y) + scale * total for the 16 rows of a panel, of which the real ones are written.
AVX2_INLINE void add_to_outputs(const Problem& p, int64_t g, int64_t row, int64_t panel, bool first,
                                const __m256i total[2]) {
  alignas(32) int32_t sums[kPanelRows];
  for (int h = 0; h < 2; ++h) {
    const __m256i scaled = p.format == Format::kBinary ? _mm256_slli_epi32(total[h], 1) : total[h];
    _mm256_store_si256(reinterpret_cast<__m256i*>(sums + 8 * h), scaled);
  }
  int32_t* y = p.outputs(g, row, panel);
  const int32_t x_sum = p.x_sum(row, g);
  for (int64_t r = 0; r < p.panel_rows(panel); ++r) y[r] = (first ? -x_sum : y[r]) + sums[r];
}

// One row of x times one panel. The low nibble of a byte is taken in place, the high one after one shift, so a nibble
// has kInPlace fields standing at scale 2^(bits s). A pair of products reaches 2 x 8 x 128 = 2048 in size at the
// highest scale (ternary 2 << 2, binary 1 << 3), twice per block: 8 blocks sum to at least -32768, which int16 just
// holds, and at most 32512.
template <int kBits>
AVX2 void decode(const Problem& p, int64_t row, int64_t panel) {
  constexpr int kInPlace = 4 / kBits;
  constexpr int64_t kWidenBlocks = 8;
  const __m256i low_nibbles = _mm256_set1_epi8(0x0f);
  for (int64_t g = 0; g < p.groups; ++g) {
    const uint8_t* w = p.block(panel, g, 0);
    const int8_t* x = p.inputs(row, g, 0);
    __m256i total[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int64_t b = 0; b < p.group_blocks; b += kWidenBlocks) {
      const int64_t blocks = std::min(kWidenBlocks, p.group_blocks - b);
      __m256i sums[2][kInPlace];
      for (int h = 0; h < 2; ++h) {
        for (int s = 0; s < kInPlace; ++s) sums[h][s] = _mm256_setzero_si256();
      }
      for (int64_t i = 0; i < blocks; ++i, w += kBlockBytes, x += 8 * kInPlace) {
        for (int h = 0; h < 2; ++h) {
          const __m256i packed = load(w + 32 * h);
          const __m256i nibbles[2] = {_mm256_and_si256(packed, low_nibbles),
                                      _mm256_and_si256(_mm256_srli_epi16(packed, 4), low_nibbles)};
          for (int half = 0; half < 2; ++half) {
            for (int s = 0; s < kInPlace; ++s) {
              const __m256i mask = _mm256_set1_epi8(((1 << kBits) - 1) << (kBits * s));
              const __m256i x4 = broadcast4(x + 4 * (half * kInPlace + s));
              const __m256i pairs = _mm256_maddubs_epi16(_mm256_and_si256(nibbles[half], mask), x4);
              sums[h][s] = _mm256_add_epi16(sums[h][s], pairs);
            }
          }
        }
      }
      for (int h = 0; h < 2; ++h) {
        for (int s = 0; s < kInPlace; ++s) {  // exact: every sum is a multiple of its scale
          total[h] = _mm256_add_epi32(total[h], _mm256_srai_epi32(widen(sums[h][s]), kBits * s));
        }
      }
    }
    add_to_outputs(p, g, row, panel, true, total);
  }
}

constexpr int64_t kTileInputs = 1024;  // of one panel, unpacked at a time: 16 KiB, in L1
constexpr int kTileRows = 4;           // rows of x: 4 x 2 int16 accumulators
// A pair of products reaches 2 x 2 x 128 = 512 in size: 64 of them sum to at least -32768 and at most 32512.
constexpr int64_t kWidenInputs = 4 * 64;

// Unpacks blocks of one panel to fields[input / 4][2][32], fields at the bottom of their bytes.
template <int kBits>
AVX2 void unpack(const uint8_t* w, int64_t blocks, __m256i* fields) {
  constexpr int kFields = 8 / kBits;
  const __m256i mask = _mm256_set1_epi8((1 << kBits) - 1);
  for (int64_t b = 0; b < blocks; ++b) {
    for (int h = 0; h < 2; ++h) {
      const __m256i packed = load(w + b * kBlockBytes + 32 * h);
      for (int s = 0; s < kFields; ++s) {
        const __m256i shifted = _mm256_srli_epi16(packed, kBits * s);
        fields[2 * (b * kFields + s) + h] = _mm256_and_si256(shifted, mask);
      }
    }
  }
}

// kRows rows of x times one unpacked panel, added to y.
template <int kRows>
AVX2 void multiply(const Problem& p, int64_t row, int64_t panel, int64_t g, int64_t b, int64_t blocks,
                   const __m256i* fields) {
  const int64_t inputs = blocks * p.block_inputs();
  __m256i total[kRows][2];
  const int8_t* x[kRows];
  BITNET_UNROLL
  for (int t = 0; t < kRows; ++t) {
    x[t] = p.inputs(row + t, g, b);
    total[t][0] = total[t][1] = _mm256_setzero_si256();
  }
  for (int64_t c = 0; c < inputs; c += kWidenInputs) {
    __m256i sums[kRows][2];
    BITNET_UNROLL
    for (int t = 0; t < kRows; ++t) sums[t][0] = sums[t][1] = _mm256_setzero_si256();
    const int64_t stop = std::min(inputs, c + kWidenInputs);
    for (int64_t i = c; i < stop; i += 4, fields += 2) {
      const __m256i low = _mm256_load_si256(fields), high = _mm256_load_si256(fields + 1);
      BITNET_UNROLL
      for (int t = 0; t < kRows; ++t) {
        const __m256i x4 = broadcast4(x[t] + i);
        sums[t][0] = _mm256_add_epi16(sums[t][0], _mm256_maddubs_epi16(low, x4));
        sums[t][1] = _mm256_add_epi16(sums[t][1], _mm256_maddubs_epi16(high, x4));
      }
    }
    BITNET_UNROLL
    for (int t = 0; t < kRows; ++t) {
      for (int h = 0; h < 2; ++h) total[t][h] = _mm256_add_epi32(total[t][h], widen(sums[t][h]));
    }
  }
  BITNET_UNROLL
  for (int t = 0; t < kRows; ++t) add_to_outputs(p, g, row + t, panel, b == 0, total[t]);
}

template <int kBits>
AVX2 void matmul_panel(const Problem& p, int64_t panel) {
  constexpr int64_t kTileBlocks = kTileInputs / (4 * (8 / kBits));
  __m256i fields[2 * kTileInputs / 4];
  for (int64_t g = 0; g < p.groups; ++g) {
    for (int64_t b = 0; b < p.group_blocks; b += kTileBlocks) {
      const int64_t blocks = std::min(kTileBlocks, p.group_blocks - b);
      unpack<kBits>(p.block(panel, g, b), blocks, fields);
      int64_t row = 0;
      for (; row + kTileRows <= p.m; row += kTileRows) multiply<kTileRows>(p, row, panel, g, b, blocks, fields);
      switch (p.m - row) {
        case 1: multiply<1>(p, row, panel, g, b, blocks, fields); break;
        case 2: multiply<2>(p, row, panel, g, b, blocks, fields); break;
        case 3: multiply<3>(p, row, panel, g, b, blocks, fields); break;
      }
    }
  }
}

template <int kBits>
AVX2 void matmul_bits(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    p.m == 1 ? decode<kBits>(p, 0, panel) : matmul_panel<kBits>(p, panel);
  }
}

void matmul(const Problem& p, int64_t begin, int64_t end) {
  switch (p.format) {
    case Format::kBinary: return matmul_bits<1>(p, begin, end);
    case Format::kTernary2: return matmul_bits<2>(p, begin, end);
    default: return kScalarKernels.matmul(p, begin, end);
  }
}

AVX2 int32_t sum(const int8_t* x, int64_t count) {
  int32_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += x[i];
  return total;
}

}  // namespace

const Kernels kAvx2Kernels = {"avx2", matmul, sum};

}  // namespace bitnet

#endif  // __x86_64__
