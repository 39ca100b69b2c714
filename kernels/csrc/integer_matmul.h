// The integer product of int8 activations with a packed matrix, on raw pointers.
//
// A packed matrix is a run of panels of 16 rows; a panel is a run of 64-byte blocks along k; byte 4 r + j of a
// block holds the fields of row r, field s multiplying input 4 s + j of the block (see bitnet_kernels/packed.py).
// So a 32-bit lane is a row, field s of all rows multiplies one broadcast dword of x, and 16 results leave as
// one vector: no shuffles and no horizontal sums.
//
// The kernels sum fields f >= 0 instead of codes and correct once at the end:
// sum(code x) = multiplier sum(f x) - offset sum(x).

#ifndef BITNET_KERNELS_INTEGER_MATMUL_H_
#define BITNET_KERNELS_INTEGER_MATMUL_H_

#include <algorithm>
#include <cstdint>

namespace bitnet {

constexpr int64_t kPanelRows = 16;
constexpr int64_t kBlockBytes = 64;

// What a byte holds. The values are those of the custom calls' attribute.
enum class Format : int64_t {
  kBinary,    // 8 codes -1, 1 as a bit: field 1 for +1
  kTernary2,  // 4 codes -1, 0, 1 of two bits: field = code + 1
  kTernary5,  // 5 codes -1, 0, 1 as digits to the base 3, field 0 the lowest: field = code + 1
  kInt4,      // 2 codes -8 .. 7: field = code + 8
  kInt8,      // 1 code -128 .. 127: field = code + 128
  kUint4,     // 2 codes 0 .. 15: field = code; besides a scale there is a minimum
};

constexpr Format kFormats[] = {Format::kBinary, Format::kTernary2, Format::kTernary5,
                               Format::kInt4,   Format::kInt8,     Format::kUint4};

constexpr int fields(Format format) {
  constexpr int kFields[] = {8, 4, 5, 2, 1, 2};
  return kFields[static_cast<int>(format)];
}
// A byte is the sum of field s times base^s.
constexpr int field_base(Format format) { return format == Format::kTernary5 ? 3 : 1 << (8 / fields(format)); }
constexpr int highest_field(Format format) { return format == Format::kTernary2 ? 2 : field_base(format) - 1; }
constexpr int64_t block_inputs(Format format) { return 4 * fields(format); }
constexpr int32_t multiplier(Format format) { return format == Format::kBinary ? 2 : 1; }
constexpr int32_t offset(Format format) {
  constexpr int32_t kOffsets[] = {1, 1, 1, 8, 128, 0};
  return kOffsets[static_cast<int>(format)];
}
// W = code * scale + minimum.
constexpr bool has_minimum(Format format) { return format == Format::kUint4; }

// Decoding leaves a field where it stands in its byte, so a product is as large as (byte & field) * 128: 162 * 128 per
// five inputs at most for base 3, 240 * 128 per two for four bits, 255 * 128 for int8. Sums of that stay below 2^31.
constexpr int64_t max_group_inputs(Format format) {
  return int64_t{1} << (fields(format) == 1 ? 16 : fields(format) == 2 ? 17 : 18);
}

constexpr int64_t kTileInputs = 2048;  // of the matrix, unpacked at a time: 32 KiB a panel
constexpr int64_t kMaxTilePanels = 4;  // of every instruction set
constexpr int64_t kMaxStreams = 4;     // panels that few rows of x are multiplied with in step, of every instruction set

struct Problem {
  Format format;
  int64_t m;             // rows of x
  int64_t n;             // rows of the matrix, without padding
  int64_t groups;        // scale groups along the input
  int64_t group_blocks;  // blocks of one group, the last one padded with zeros
  const int8_t* x;       // [m, x_stride], zero where the matrix is padded
  int64_t x_stride;
  const int32_t* x_sums;  // [m, groups], sums of x over a group
  const uint8_t* w;       // [ceil(n / 16), groups * group_blocks, 64]
  int32_t* y;             // [groups, m, n]
  int64_t ahead = 0;      // bytes of w from a block that is multiplied to the one that is fetched into cache

  int64_t block_inputs() const { return bitnet::block_inputs(format); }
  int64_t group_inputs() const { return group_blocks * block_inputs(); }
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

// The rows of x whose look-up tables are built together for one call, to be multiplied with as many panels as possible;
// 0 where a product uses no tables.
using TableRows = int64_t (*)(const Problem&);

struct MatmulScales;  // scaled_matmul.h
// Writes the float32 results out[m, n] for the matrix panels [begin, end), each group of up to kTileInputs inputs scaled
// while its sums are in registers. scratch: kMaxTilePanels * groups * kPanelRows floats, twice as many with a minimum.
using Scaled = void (*)(const Problem&, const MatmulScales& s, float* out, int64_t begin, int64_t end,
                        float* scratch);

// The loops of one instruction set; defined in integer_matmul_<name>.cc and sign_matmul.cc, listed in kernels.cc.
struct MatmulKernels {
  Matmul matmul;
  Sum sum;
  TableRows table_rows;  // null where no product uses tables
  Scaled scaled;         // null where sums of groups are written to memory before they are scaled
};

}  // namespace bitnet

#endif  // BITNET_KERNELS_INTEGER_MATMUL_H_
