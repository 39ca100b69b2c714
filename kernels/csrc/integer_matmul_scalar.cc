// Portable C++: the definition in loops, for any processor.

#include "integer_matmul.h"

#include <cstring>

namespace bitnet {
namespace {

constexpr int64_t kChunkBlocks = 16;  // blocks unpacked at a time: at most 512 inputs, 8 KiB

// Unpacks blocks of one panel to unpacked[input][row].
template <Format kFormat>
void unpack(const uint8_t* packed, int64_t blocks, uint8_t (*unpacked)[kPanelRows]) {
  constexpr int kBase = field_base(kFormat);
  for (int64_t b = 0; b < blocks; ++b) {
    uint8_t digits[kBlockBytes];
    std::memcpy(digits, packed + b * kBlockBytes, kBlockBytes);
    for (int s = 0; s < fields(kFormat); ++s) {
      for (int j = 0; j < 4; ++j, ++unpacked) {
        for (int r = 0; r < kPanelRows; ++r) {
          uint8_t& digit = digits[4 * r + j];
          (*unpacked)[r] = static_cast<uint8_t>(digit % kBase);
          digit = static_cast<uint8_t>(digit / kBase);
        }
      }
    }
  }
}

template <Format kFormat>
void matmul_format(const Problem& p, int64_t begin, int64_t end) {
  uint8_t unpacked[kChunkBlocks * block_inputs(Format::kBinary)][kPanelRows];
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t g = 0; g < p.groups; ++g) {
      for (int64_t b = 0; b < p.group_blocks; b += kChunkBlocks) {
        const int64_t blocks = std::min(kChunkBlocks, p.group_blocks - b);
        unpack<kFormat>(p.block(panel, g, b), blocks, unpacked);
        for (int64_t row = 0; row < p.m; ++row) {
          const int8_t* x = p.inputs(row, g, b);
          int32_t sums[kPanelRows] = {};
          for (int64_t i = 0; i < blocks * block_inputs(kFormat); ++i) {
            for (int64_t r = 0; r < kPanelRows; ++r) sums[r] += unpacked[i][r] * x[i];
          }
          int32_t* y = p.outputs(g, row, panel);
          for (int64_t r = 0; r < p.panel_rows(panel); ++r) {
            y[r] = (b == 0 ? -offset(kFormat) * p.x_sum(row, g) : y[r]) + multiplier(kFormat) * sums[r];
          }
        }
      }
    }
  }
}

void matmul(const Problem& p, int64_t begin, int64_t end) {
  switch (p.format) {
    case Format::kBinary: return matmul_format<Format::kBinary>(p, begin, end);
    case Format::kTernary2: return matmul_format<Format::kTernary2>(p, begin, end);
    case Format::kTernary5: return matmul_format<Format::kTernary5>(p, begin, end);
    case Format::kInt4: return matmul_format<Format::kInt4>(p, begin, end);
    case Format::kInt8: return matmul_format<Format::kInt8>(p, begin, end);
    case Format::kUint4: return matmul_format<Format::kUint4>(p, begin, end);
  }
}

int32_t sum(const int8_t* x, int64_t count) {
  int32_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += x[i];
  return total;
}

}  // namespace

extern const MatmulKernels kScalarInteger;
const MatmulKernels kScalarInteger = {matmul, sum, nullptr, nullptr};

}  // namespace bitnet
