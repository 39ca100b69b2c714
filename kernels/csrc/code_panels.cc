#include "code_panels.h"

#include <cstring>
#include <vector>

namespace bitnet {
namespace {

// The four bytes of a row in a block are a word: the sum over s of (fields of inputs 4 s .. 4 s + 3) times base^s.
template <Format kFormat>
void pack(const int8_t* codes, int64_t stride, int64_t rows, int64_t inputs, int64_t blocks, uint8_t* to) {
  static thread_local std::vector<uint8_t> fields;
  fields.assign(blocks * block_inputs(kFormat), 0);
  std::memset(to, 0, blocks * kBlockBytes);
  for (int64_t r = 0; r < rows; ++r) {
    const int8_t* row = codes + r * stride;
    for (int64_t i = 0; i < inputs; ++i) {
      fields[i] = static_cast<uint8_t>(row[i] + offset(kFormat)) / multiplier(kFormat);
    }
    const uint8_t* from = fields.data();
    for (int64_t b = 0; b < blocks; ++b) {
      uint32_t word = 0, place = 1;
      for (int s = 0; s < bitnet::fields(kFormat); ++s, from += 4, place *= field_base(kFormat)) {
        uint32_t four;
        std::memcpy(&four, from, sizeof(four));
        word += four * place;
      }
      std::memcpy(to + b * kBlockBytes + 4 * r, &word, sizeof(word));
    }
  }
}

}  // namespace

void pack_panel(Format format, const int8_t* codes, int64_t stride, int64_t rows, int64_t inputs, int64_t blocks,
                uint8_t* to) {
  switch (format) {
    case Format::kBinary: return pack<Format::kBinary>(codes, stride, rows, inputs, blocks, to);
    case Format::kTernary2: return pack<Format::kTernary2>(codes, stride, rows, inputs, blocks, to);
    case Format::kTernary5: return pack<Format::kTernary5>(codes, stride, rows, inputs, blocks, to);
    case Format::kInt4: return pack<Format::kInt4>(codes, stride, rows, inputs, blocks, to);
    case Format::kInt8: return pack<Format::kInt8>(codes, stride, rows, inputs, blocks, to);
    case Format::kUint4: return pack<Format::kUint4>(codes, stride, rows, inputs, blocks, to);
  }
}

}  // namespace bitnet
