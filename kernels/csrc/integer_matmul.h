// The integer product of int8 activations with a packed matrix, on raw pointers.
//
// A packed matrix is a run of panels of 16 rows; a panel is a run of 64-byte blocks along k; byte 4 r + j of a
// block holds the fields of row r, field s multiplying input 4 s + j of the block (see bitnet_kernels/packed.py).
// So a 32-bit lane is a row, field s of all rows multiplies one broadcast dword of x, and 16 results leave as
// one vector: no shuffles and no horizontal sums.
//
// The kernels sum fields f (binary 0, 1; ternary 0, 1, 2) instead of codes and correct once at the end:
// sum(code x) = 2 sum(f x) - sum(x) for binary, sum(f x) - sum(x) for ternary.

#ifndef BITNET_KERNELS_INTEGER_MATMUL_H_
#define BITNET_KERNELS_INTEGER_MATMUL_H_

#include <algorithm>
#include <cstdint>

// Before a loop over accumulators: they stay in registers only where the loop is unrolled whole.
#if defined(__clang__)
#define BITNET_UNROLL _Pragma("clang loop unroll(full)")
#else
#define BITNET_UNROLL _Pragma("GCC unroll 16")
#endif

namespace bitnet {

constexpr int64_t kPanelRows = 16;
constexpr int64_t kBlockBytes = 64;

// The AND-only kernels let field s stand scaled by 2^(bits s), at most 128 a product: the accumulator of the highest
// ternary field stays below 2^31 up to 524287 inputs of a group. One simple bound for all kernels is kept below that.
constexpr int64_t kMaxGroupInputs = int64_t{1} << 18;

struct Problem {
  int64_t bits;          // 1: binary, 2: ternary
  int64_t m;             // rows of x
  int64_t n;             // rows of the matrix, without padding
  int64_t groups;        // scale groups along the input
  int64_t group_blocks;  // blocks of one group, the last one padded
  const int8_t* x;       // [m, x_stride], zero where the matrix is padded
  int64_t x_stride;
  const int32_t* x_sums;  // [m, groups], sums of x over a group
  const uint8_t* w;       // [ceil(n / 16), groups * group_blocks, 64]
  int32_t* y;             // [groups, m, n]

  int64_t fields() const { return 8 / bits; }
  int64_t block_inputs() const { return 4 * fields(); }
  int64_t panels() const { return (n + kPanelRows - 1) / kPanelRows; }
  int64_t panel_bytes() const { return groups * group_blocks * kBlockBytes; }
  int64_t panel_rows(int64_t panel) const { return std::min(kPanelRows, n - panel * kPanelRows); }
  const uint8_t* block(int64_t panel, int64_t group, int64_t block) const {
    return w + panel * panel_bytes() + (group * group_blocks + block) * kBlockBytes;
  }
  const int8_t* inputs(int64_t row, int64_t group, int64_t block) const {
    return x + row * x_stride + (group * group_blocks + block) * block_inputs();
  }
  int32_t x_sum(int64_t row, int64_t group) const { return x_sums[row * groups + group]; }
  int32_t* outputs(int64_t group, int64_t row, int64_t panel) const {
    return y + (group * m + row) * n + panel * kPanelRows;
  }
};

// Writes y for all rows of x, all groups and the matrix panels [begin, end). Any thread, no allocation.
using Matmul = void (*)(const Problem&, int64_t begin, int64_t end);
// The sum of x[0 .. count).
using Sum = int32_t (*)(const int8_t* x, int64_t count);

// One instruction set: a name and its two loops.
struct Kernels {
  const char* isa;
  Matmul matmul;
  Sum sum;
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512VnniKernels;
#endif

}  // namespace bitnet

#endif  // BITNET_KERNELS_INTEGER_MATMUL_H_
