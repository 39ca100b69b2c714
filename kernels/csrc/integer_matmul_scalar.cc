// Portable C++: the definition in loops, for any processor.

#include "integer_matmul.h"

#include <cstring>

namespace bitnet {
namespace {

constexpr int64_t kChunkBlocks = 16;  // blocks unpacked at a time: at most 512 inputs, 8 KiB

// Unpacks blocks of one panel to fields[input][row].
void unpack(const Problem& p, const uint8_t* packed, int64_t blocks, uint8_t (*fields)[kPanelRows]) {
  const uint32_t mask = (1u << p.bits) - 1;
  for (int64_t b = 0; b < blocks; ++b) {
    uint32_t rows[kPanelRows];  // the four bytes of a row, as one little-endian word
    std::memcpy(rows, packed + b * kBlockBytes, kBlockBytes);
    for (int64_t s = 0; s < p.fields(); ++s) {
      for (int64_t j = 0; j < 4; ++j, ++fields) {
        for (int64_t r = 0; r < kPanelRows; ++r) {
          (*fields)[r] = static_cast<uint8_t>((rows[r] >> (8 * j + p.bits * s)) & mask);
        }
      }
    }
  }
}

void matmul(const Problem& p, int64_t begin, int64_t end) {
  const int32_t scale = p.bits == 1 ? 2 : 1;
  uint8_t fields[kChunkBlocks * 32][kPanelRows];
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t g = 0; g < p.groups; ++g) {
      for (int64_t b = 0; b < p.group_blocks; b += kChunkBlocks) {
        const int64_t blocks = std::min(kChunkBlocks, p.group_blocks - b);
        unpack(p, p.block(panel, g, b), blocks, fields);
        for (int64_t row = 0; row < p.m; ++row) {
          const int8_t* x = p.inputs(row, g, b);
          int32_t sums[kPanelRows] = {};
          for (int64_t i = 0; i < blocks * p.block_inputs(); ++i) {
            for (int64_t r = 0; r < kPanelRows; ++r) sums[r] += fields[i][r] * x[i];
          }
          int32_t* y = p.outputs(g, row, panel);
          for (int64_t r = 0; r < p.panel_rows(panel); ++r) {
            y[r] = (b == 0 ? -p.x_sum(row, g) : y[r]) + scale * sums[r];
          }
        }
      }
    }
  }
}

int32_t sum(const int8_t* x, int64_t count) {
  int32_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += x[i];
  return total;
}

}  // namespace

const Kernels kScalarKernels = {"scalar", matmul, sum};

}  // namespace bitnet
