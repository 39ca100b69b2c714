// AVX-512 with VNNI: vpdpbusd multiplies 64 unsigned fields with 64 signed activations and adds groups of four to
// 16 int32 lanes, exactly for every int8 value.

#include "integer_matmul.h"

#if defined(__x86_64__)

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 says so of its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cstring>

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define VNNI_INLINE VNNI inline __attribute__((always_inline))

namespace bitnet {
namespace {

// As assembly, because gcc 12 copies accumulators around the intrinsic.
VNNI_INLINE __m512i dot(__m512i sums, __m512i fields, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(fields), "v"(x));
  return sums;
}

VNNI_INLINE __m512i broadcast4(const int8_t* x) {
  int32_t dword;
  std::memcpy(&dword, x, 4);
  return _mm512_set1_epi32(dword);
}

VNNI_INLINE __mmask16 row_mask(const Problem& p, int64_t panel) {
  return static_cast<__mmask16>((1u << p.panel_rows(panel)) - 1);
}

// One row of x times kPanels panels in step, so that each thread reads as many memory streams. Fields are not shifted
// down: field s keeps its place in the byte, has its own accumulator, and that is shifted once at the end (exact: every
// product is a multiple of 2^(bits s)).
template <int kBits, int kPanels>
VNNI void decode(const Problem& p, int64_t row, int64_t panel, int64_t panel_step) {
  constexpr int kFields = 8 / kBits;
  for (int64_t g = 0; g < p.groups; ++g) {
    __m512i sums[kPanels][kFields];
    for (int i = 0; i < kPanels; ++i) {
      for (int s = 0; s < kFields; ++s) sums[i][s] = _mm512_setzero_si512();
    }
    const uint8_t* w[kPanels];
    for (int i = 0; i < kPanels; ++i) w[i] = p.block(panel + i * panel_step, g, 0);
    const int8_t* x = p.inputs(row, g, 0);
    for (int64_t b = 0; b < p.group_blocks; ++b, x += 4 * kFields) {
      __m512i fields[kPanels];
      for (int i = 0; i < kPanels; ++i) {
        fields[i] = _mm512_loadu_si512(w[i] + b * kBlockBytes);
        asm("" : "+v"(fields[i]));  // one load per block: gcc 12 would fold it into every AND
      }
      for (int s = 0; s < kFields; ++s) {
        const __m512i x4 = broadcast4(x + 4 * s);
        const __m512i mask = _mm512_set1_epi8(static_cast<char>(((1 << kBits) - 1) << (kBits * s)));
        for (int i = 0; i < kPanels; ++i) sums[i][s] = dot(sums[i][s], _mm512_and_si512(fields[i], mask), x4);
      }
    }
    const __m512i x_sum = _mm512_set1_epi32(p.x_sum(row, g));
    for (int i = 0; i < kPanels; ++i) {
      __m512i total = sums[i][0];
      for (int s = 1; s < kFields; ++s) total = _mm512_add_epi32(total, _mm512_srai_epi32(sums[i][s], kBits * s));
      if (kBits == 1) total = _mm512_slli_epi32(total, 1);
      const int64_t target = panel + i * panel_step;
      _mm512_mask_storeu_epi32(p.outputs(g, row, target), row_mask(p, target), _mm512_sub_epi32(total, x_sum));
    }
  }
}

constexpr int kTilePanels = 4;        // 64 rows of the matrix
constexpr int64_t kTileInputs = 1024;  // unpacked at a time: 64 KiB, in L2
constexpr int kTileRows = 6;          // rows of x: 6 x 4 accumulators

// Unpacks blocks of up to four panels to fields[input / 4][panel][64], fields at the bottom of their bytes.
template <int kBits>
VNNI void unpack(const Problem& p, int64_t panel, int64_t panels, int64_t g, int64_t b, int64_t blocks,
                 __m512i* fields) {
  constexpr int kFields = 8 / kBits;
  const __m512i mask = _mm512_set1_epi8((1 << kBits) - 1);
  for (int64_t i = 0; i < panels; ++i) {
    const uint8_t* w = p.block(panel + i, g, b);
    for (int64_t block = 0; block < blocks; ++block) {
      const __m512i packed = _mm512_loadu_si512(w + block * kBlockBytes);
      for (int s = 0; s < kFields; ++s) {
        const __m512i shifted = _mm512_srli_epi16(packed, kBits * s);
        fields[(block * kFields + s) * kTilePanels + i] = _mm512_and_si512(shifted, mask);
      }
    }
  }
}

// kRows rows of x times one unpacked tile, added to y.
template <int kRows>
VNNI void multiply(const Problem& p, int64_t row, int64_t panel, int64_t panels, int64_t g, int64_t b, int64_t blocks,
                   const __m512i* fields) {
  __m512i sums[kRows][kTilePanels];
  const int8_t* x[kRows];
  BITNET_UNROLL
  for (int t = 0; t < kRows; ++t) {
    x[t] = p.inputs(row + t, g, b);
    for (int i = 0; i < kTilePanels; ++i) sums[t][i] = _mm512_setzero_si512();
  }
  const int64_t inputs = blocks * p.block_inputs();
  for (int64_t c = 0; c < inputs; c += 4, fields += kTilePanels) {
    __m512i w[kTilePanels];
    for (int i = 0; i < kTilePanels; ++i) {
      w[i] = fields[i];
      asm("" : "+v"(w[i]));
    }
    BITNET_UNROLL
    for (int t = 0; t < kRows; ++t) {
      const __m512i x4 = broadcast4(x[t] + c);
      for (int i = 0; i < kTilePanels; ++i) sums[t][i] = dot(sums[t][i], w[i], x4);
    }
  }
  BITNET_UNROLL
  for (int t = 0; t < kRows; ++t) {
    const __m512i x_sum = _mm512_set1_epi32(p.x_sum(row + t, g));
    for (int i = 0; i < kTilePanels; ++i) {  // a constant bound keeps sums in registers
      if (i >= panels) continue;
      int32_t* y = p.outputs(g, row + t, panel + i);
      const __mmask16 mask = row_mask(p, panel + i);
      __m512i total = p.format == Format::kBinary ? _mm512_slli_epi32(sums[t][i], 1) : sums[t][i];
      total = b == 0 ? _mm512_sub_epi32(total, x_sum) : _mm512_add_epi32(total, _mm512_maskz_loadu_epi32(mask, y));
      _mm512_mask_storeu_epi32(y, mask, total);
    }
  }
}

template <int kBits>
VNNI void matmul_tile(const Problem& p, int64_t panel, int64_t panels) {
  constexpr int64_t kTileBlocks = kTileInputs / (4 * (8 / kBits));
  __m512i fields[kTilePanels * kTileInputs / 4];
  if (panels < kTilePanels) std::memset(fields, 0, sizeof(fields));  // the absent panels are multiplied too
  for (int64_t g = 0; g < p.groups; ++g) {
    for (int64_t b = 0; b < p.group_blocks; b += kTileBlocks) {
      const int64_t blocks = std::min(kTileBlocks, p.group_blocks - b);
      unpack<kBits>(p, panel, panels, g, b, blocks, fields);
      int64_t row = 0;
      for (; row + kTileRows <= p.m; row += kTileRows) multiply<kTileRows>(p, row, panel, panels, g, b, blocks, fields);
      switch (p.m - row) {
        case 1: multiply<1>(p, row, panel, panels, g, b, blocks, fields); break;
        case 2: multiply<2>(p, row, panel, panels, g, b, blocks, fields); break;
        case 3: multiply<3>(p, row, panel, panels, g, b, blocks, fields); break;
        case 4: multiply<4>(p, row, panel, panels, g, b, blocks, fields); break;
        case 5: multiply<5>(p, row, panel, panels, g, b, blocks, fields); break;
      }
    }
  }
}

template <int kBits>
VNNI void matmul_bits(const Problem& p, int64_t begin, int64_t end) {
  if (p.m == 1) {
    const int64_t half = (end - begin) / 2;
    for (int64_t i = 0; i < half; ++i) decode<kBits, 2>(p, 0, begin + i, half);
    if ((end - begin) % 2) decode<kBits, 1>(p, 0, end - 1, 0);
  } else {
    for (int64_t panel = begin; panel < end; panel += kTilePanels) {
      matmul_tile<kBits>(p, panel, std::min<int64_t>(kTilePanels, end - panel));
    }
  }
}

void matmul(const Problem& p, int64_t begin, int64_t end) {
  switch (p.format) {
    case Format::kBinary: return matmul_bits<1>(p, begin, end);
    case Format::kTernary2: return matmul_bits<2>(p, begin, end);
    default: return kScalarKernels.matmul(p, begin, end);
  }
}

VNNI int32_t sum(const int8_t* x, int64_t count) {
  __m512i total = _mm512_setzero_si512();
  const __m512i ones = _mm512_set1_epi8(1);
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) total = dot(total, ones, _mm512_loadu_si512(x + i));
  if (i < count) {
    const __mmask64 mask = (~uint64_t{0}) >> (64 - (count - i));
    total = dot(total, ones, _mm512_maskz_loadu_epi8(mask, x + i));
  }
  return _mm512_reduce_add_epi32(total);
}

}  // namespace

const Kernels kAvx512VnniKernels = {"avx512vnni", matmul, sum};

}  // namespace bitnet

#endif  // __x86_64__
