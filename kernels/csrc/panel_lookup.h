// Binary matrices times many rows of x by look-up, for processors that shuffle 512 bits as fast as they multiply them.
//
// The sums of all subsets of six inputs are a table of 64 int16 in two registers, and six bits of 32 rows of the matrix
// look 32 of them up in one instruction: 192 products where vpdpbusd makes 64. A dword of a block is 32 bits of one row;
// the low halves of those of two panels make a vector of 32 words, their high halves another. A word is three indices,
// of 6, 5 and 5 bits, which shifts alone bring to the bottom: the instructions ignore the bits above.

#ifndef BITNET_KERNELS_PANEL_LOOKUP_H_
#define BITNET_KERNELS_PANEL_LOOKUP_H_

#include "panel_avx512vbmi.h"
#include "panel_matmul.h"

namespace bitnet {
namespace {

constexpr int64_t kTableBlocks = 8;  // looked up before int16 may overflow: 256 inputs of -128
constexpr int64_t kTableRows = 32;   // rows of x whose tables of kTableBlocks blocks, 128 KiB, stay in L2
constexpr int kPairs = 4;            // of panels, times ...
constexpr int kLookupRows = 4;       // ... rows of x: the accumulators

struct Lookup {
  __m512i tables[kTableRows][kTableBlocks][2][4];    // of each half: 64 sums, 32 sums, 32 sums
  __m512i indices[kTableBlocks][2][3][kPairs];
};

// For vpmaddubsw, word i holds bits `low` and `high` of i as bytes; bit kNever is 0, bit kAlways 1.
constexpr int kNever = 6, kAlways = 7;
struct PairMask {
  alignas(64) uint8_t bytes[64] = {};
  constexpr PairMask(int low, int high) {
    for (int i = 0; i < 32; ++i) {
      bytes[2 * i] = (i | 1 << kAlways) >> low & 1;
      bytes[2 * i + 1] = (i | 1 << kAlways) >> high & 1;
    }
  }
};

BITNET_INLINE __m512i add(__m512i a, __m512i b) { return _mm512_add_epi16(a, b); }

template <int kLow, int kHigh>
BITNET_INLINE __m512i masked_pairs(__m512i pair) {
  static constexpr PairMask kMask(kLow, kHigh);
  return _mm512_maddubs_epi16(_mm512_load_si512(kMask.bytes), pair);
}

// Tables of the inputs that the halves of the dwords of a block multiply: bit 8 j + s of a dword is input 4 s + j.
void make_tables(const int8_t* x, int64_t blocks, __m512i (*tables)[2][4]) {
  alignas(32) static constexpr uint8_t kOrder[32] = {0, 4, 8,  12, 16, 20, 24, 28, 1, 5, 9,  13, 17, 21, 25, 29,
                                                     2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31};
  const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(kOrder));
  for (int64_t b = 0; b < blocks; ++b, x += block_inputs(Format::kBinary)) {
    alignas(32) int16_t pairs[16];  // of inputs, in the order of the bits
    const __m256i inputs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), _mm256_permutexvar_epi8(order, inputs));
    for (int half = 0; half < 2; ++half) {
      __m512i pair[8];
      unrolled<8>([&](auto i) BITNET_INLINE_BODY { pair[i] = _mm512_set1_epi16(pairs[8 * half + i]); });
      const __m512i four = add(masked_pairs<0, 1>(pair[0]), masked_pairs<2, 3>(pair[1]));
      __m512i* table = tables[b][half];
      table[0] = add(four, masked_pairs<4, kNever>(pair[2]));
      table[1] = add(four, masked_pairs<4, kAlways>(pair[2]));
      table[2] = add(add(masked_pairs<0, 1>(pair[3]), masked_pairs<2, 3>(pair[4])), masked_pairs<4, kNever>(pair[5]));
      table[3] = add(add(masked_pairs<kNever, 0>(pair[5]), masked_pairs<1, 2>(pair[6])), masked_pairs<3, 4>(pair[7]));
    }
  }
}

// Indices of up to kPairs pairs of panels; those behind `end` are arbitrary.
void make_indices(const Problem& p, int64_t panel, int64_t end, int64_t g, int64_t b, int64_t blocks, Lookup& lookup) {
  for (int64_t pair = 0; panel + 2 * pair < end; ++pair) {
    const int64_t even = panel + 2 * pair, odd = std::min(even + 1, end - 1);
    for (int64_t block = 0; block < blocks; ++block) {
      const __m512i first = _mm512_loadu_si512(p.block(even, g, b + block));
      const __m512i second = _mm512_loadu_si512(p.block(odd, g, b + block));
      const __m512i halves[2] = {_mm512_mask_blend_epi16(0xaaaaaaaa, first, _mm512_slli_epi32(second, 16)),
                                 _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(first, 16), second)};
      unrolled<2>([&](auto half) BITNET_INLINE_BODY {
        lookup.indices[block][half][0][pair] = halves[half];
        lookup.indices[block][half][1][pair] = _mm512_srli_epi16(halves[half], 6);
        lookup.indices[block][half][2][pair] = _mm512_srli_epi16(halves[half], 11);
      });
    }
  }
}

// kRows rows of x, whose tables begin with those of `row`, times pairs of panels of which there are indices.
template <int kRows, int kCount>
void look_up(const Problem& p, int64_t first_row, int64_t row, int64_t panel, int64_t end, int64_t g, bool first,
             int64_t blocks, const Lookup& lookup) {
  __m512i sums[kRows][kCount];
  unrolled<kRows * kCount>([&](auto i) BITNET_INLINE_BODY { sums[i / kCount][i % kCount] = _mm512_setzero_si512(); });
  for (int64_t half = 0; half < 2 * blocks; ++half) {
    const auto& indices = lookup.indices[half / 2][half % 2];
    unrolled<3 * kRows>([&](auto i) BITNET_INLINE_BODY {
      constexpr int part = i / kRows, t = i % kRows;
      const __m512i* table = lookup.tables[row + t][half / 2][half % 2];
      unrolled<kCount>([&](auto pair) BITNET_INLINE_BODY {
        const __m512i index = indices[part][pair];
        const __m512i found = part == 0 ? _mm512_permutex2var_epi16(table[0], index, table[1])
                                        : _mm512_permutexvar_epi16(index, table[part + 1]);
        sums[t][pair] = add(sums[t][pair], found);
      });
    });
  }
  // y = (first ? -x_sum : y) + 2 sums, for the rows of the matrix that there are. An even panel's sums are the low words.
  __mmask16 exist[2 * kCount], added[2 * kCount];
  unrolled<2 * kCount>([&](auto i) BITNET_INLINE_BODY {
    const int64_t rows = panel + i < end ? p.panel_rows(panel + i) : 0;
    exist[i] = static_cast<__mmask16>((1u << rows) - 1);
    added[i] = first ? 0 : exist[i];
  });
  unrolled<kRows>([&](auto t) BITNET_INLINE_BODY {
    int32_t* y = p.outputs(g, first_row + row + t, panel);
    const __m512i start = _mm512_set1_epi32(-p.x_sum(first_row + row + t, g));
    unrolled<2 * kCount>([&](auto i) BITNET_INLINE_BODY {
      const __m512i twice = _mm512_set1_epi32(i % 2 == 0 ? 2 : 2 << 16);
      const __m512i before = _mm512_mask_loadu_epi32(start, added[i], y + i * kPanelRows);
      _mm512_mask_storeu_epi32(y + i * kPanelRows, exist[i], _mm512_dpwssd_epi32(before, sums[t][i / 2], twice));
    });
  });
}

template <int kCount, int kRows = kLookupRows>
void look_up_rows(const Problem& p, int64_t first_row, int64_t row, int64_t rows, int64_t panel, int64_t end, int64_t g,
                  bool first, int64_t blocks, const Lookup& lookup) {
  if constexpr (kRows > 0) {
    for (; row + kRows <= rows; row += kRows) {
      look_up<kRows, kCount>(p, first_row, row, panel, end, g, first, blocks, lookup);
    }
    look_up_rows<kCount, kRows - 1>(p, first_row, row, rows, panel, end, g, first, blocks, lookup);
  }
}

// Panels [panel, end), kPairs pairs at a time, then the rest.
template <int kCount = kPairs>
void look_up_panels(const Problem& p, int64_t first_row, int64_t rows, int64_t panel, int64_t end, int64_t g, int64_t b,
                    int64_t blocks, Lookup& lookup) {
  if constexpr (kCount > 0) {
    for (; panel + 2 * kCount - 1 <= end; panel += 2 * kCount) {
      make_indices(p, panel, std::min(end, panel + 2 * kCount), g, b, blocks, lookup);
      look_up_rows<kCount>(p, first_row, 0, rows, panel, end, g, b == 0, blocks, lookup);
    }
    look_up_panels<kCount - 1>(p, first_row, rows, panel, end, g, b, blocks, lookup);
  }
}

int64_t table_rows(const Problem& p) {
  return p.format == Format::kBinary && p.m > Avx512Vbmi::few_rows(Format::kBinary) ? kTableRows : 0;
}

void matmul_lookup(const Problem& p, int64_t begin, int64_t end) {
  if (table_rows(p) == 0) return matmul_avx512vbmi(p, begin, end);
  Lookup lookup;
  for (int64_t row = 0; row < p.m; row += kTableRows) {
    const int64_t rows = std::min(kTableRows, p.m - row);
    for (int64_t g = 0; g < p.groups; ++g) {
      for (int64_t b = 0; b < p.group_blocks; b += kTableBlocks) {
        const int64_t blocks = std::min(kTableBlocks, p.group_blocks - b);
        for (int64_t t = 0; t < rows; ++t) make_tables(p.inputs(row + t, g, b), blocks, lookup.tables[t]);
        look_up_panels(p, row, rows, begin, end, g, b, blocks, lookup);
      }
    }
  }
}

}  // namespace
}  // namespace bitnet

#endif  // BITNET_KERNELS_PANEL_LOOKUP_H_
