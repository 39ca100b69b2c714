#include "sign_matmul.h"

#include <cstring>

#include "integer_matmul.h"

#if defined(__x86_64__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // false positives of gcc 12 in its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace bitnet {
namespace {

constexpr int kMaxRows = 4;  // rows of x that share a block of weights

const uint32_t* words(const Problem& p, int64_t row, int64_t group) {
  return reinterpret_cast<const uint32_t*>(p.x + row * p.x_stride) + group * p.group_blocks;
}

// Counts of differing bits [rows][16] of one panel and group.
using Count = void (*)(const uint8_t* w, const uint32_t* const* x, int64_t blocks, int32_t (*counts)[kPanelRows]);

void write(const Problem& p, int64_t group, int64_t row, int64_t panel, const int32_t* counts) {
  int32_t* y = p.outputs(group, row, panel);
  for (int64_t r = 0; r < p.panel_rows(panel); ++r) y[r] = p.x_sum(row, group) - 2 * counts[r];
}

template <Count kOneRow, Count kAllRows>
void matmul(const Problem& p, int64_t begin, int64_t end) {
  int32_t counts[kMaxRows][kPanelRows];
  const uint32_t* x[kMaxRows];
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t g = 0; g < p.groups; ++g) {
      for (int64_t row = 0; row < p.m;) {
        const int64_t rows = p.m - row < kMaxRows ? 1 : kMaxRows;
        for (int64_t i = 0; i < rows; ++i) x[i] = words(p, row + i, g);
        (rows == 1 ? kOneRow : kAllRows)(p.block(panel, g, 0), x, p.group_blocks, counts);
        for (int64_t i = 0; i < rows; ++i) write(p, g, row + i, panel, counts[i]);
        row += rows;
      }
    }
  }
}

template <int kRows>
void count_scalar(const uint8_t* w, const uint32_t* const* x, int64_t blocks, int32_t (*counts)[kPanelRows]) {
  std::memset(counts, 0, kRows * sizeof(counts[0]));
  for (int64_t b = 0; b < blocks; ++b, w += kBlockBytes) {
    uint32_t lanes[kPanelRows];
    std::memcpy(lanes, w, sizeof(lanes));
    for (int i = 0; i < kRows; ++i) {
      for (int64_t r = 0; r < kPanelRows; ++r) counts[i][r] += __builtin_popcount(lanes[r] ^ x[i][b]);
    }
  }
}

#if defined(__x86_64__)

#define AVX2 __attribute__((target("avx2")))
#define POPCNT __attribute__((target("avx512f,avx512bw,avx512vpopcntdq")))

// Bits of every byte by a table of nibbles; bytes of 31 blocks, 8 bits at most in each, fit before they are widened.
AVX2 inline __m256i byte_counts(__m256i bits) {
  const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                         0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i low = _mm256_set1_epi8(15);
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bits, 4), low);
  return _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(bits, low)), _mm256_shuffle_epi8(table, high));
}

template <int kRows>
AVX2 void count_avx2(const uint8_t* w, const uint32_t* const* x, int64_t blocks, int32_t (*counts)[kPanelRows]) {
  std::memset(counts, 0, kRows * sizeof(counts[0]));
  const __m256i byte_ones = _mm256_set1_epi8(1), short_ones = _mm256_set1_epi16(1);
  for (int64_t b = 0; b < blocks;) {
    const int64_t until = b + 31 < blocks ? b + 31 : blocks;
    __m256i bytes[kRows][2] = {};
    for (; b < until; ++b) {
      for (int half = 0; half < 2; ++half) {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + b * kBlockBytes + 32 * half));
        for (int i = 0; i < kRows; ++i) {
          const __m256i differ = _mm256_xor_si256(v, _mm256_set1_epi32(static_cast<int32_t>(x[i][b])));
          bytes[i][half] = _mm256_add_epi8(bytes[i][half], byte_counts(differ));
        }
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int half = 0; half < 2; ++half) {
        __m256i* total = reinterpret_cast<__m256i*>(counts[i] + 8 * half);
        const __m256i sums = _mm256_madd_epi16(_mm256_maddubs_epi16(bytes[i][half], byte_ones), short_ones);
        _mm256_storeu_si256(total, _mm256_add_epi32(_mm256_loadu_si256(total), sums));
      }
    }
  }
}

template <int kRows>
POPCNT void count_popcnt(const uint8_t* w, const uint32_t* const* x, int64_t blocks, int32_t (*counts)[kPanelRows]) {
  __m512i sums[kRows];
  for (int i = 0; i < kRows; ++i) sums[i] = _mm512_setzero_si512();
  for (int64_t b = 0; b < blocks; ++b) {
    const __m512i v = _mm512_loadu_si512(w + b * kBlockBytes);
    for (int i = 0; i < kRows; ++i) {
      const __m512i differ = _mm512_xor_si512(v, _mm512_set1_epi32(static_cast<int32_t>(x[i][b])));
      sums[i] = _mm512_add_epi32(sums[i], _mm512_popcnt_epi32(differ));
    }
  }
  for (int i = 0; i < kRows; ++i) _mm512_storeu_si512(counts[i], sums[i]);
}

#endif  // __x86_64__

}  // namespace

extern const MatmulKernels kScalarSign;
const MatmulKernels kScalarSign = {matmul<count_scalar<1>, count_scalar<kMaxRows>>, nullptr, nullptr, nullptr};
#if defined(__x86_64__)
extern const MatmulKernels kAvx2Sign, kAvx512Sign;
const MatmulKernels kAvx2Sign = {matmul<count_avx2<1>, count_avx2<kMaxRows>>, nullptr, nullptr, nullptr};
const MatmulKernels kAvx512Sign = {matmul<count_popcnt<1>, count_popcnt<kMaxRows>>, nullptr, nullptr, nullptr};
#endif

void pack_signs(const int8_t* x, int64_t count, uint32_t* words) {
  for (int64_t b = 0; 32 * b < count; ++b) {
    uint32_t word = 0;
    for (int64_t i = 32 * b; i < count && i < 32 * (b + 1); ++i) {
      const int64_t s = i % 32 / 4, j = i % 4;
      word |= static_cast<uint32_t>(x[i] > 0) << (8 * j + s);
    }
    words[b] = word;
  }
}

}  // namespace bitnet
