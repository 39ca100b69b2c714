// Codes of a matrix as panels (integer_matmul.h): what formats.py does once when a model is packed, for a training step,
// whose codes are new each time.

#ifndef BITNET_KERNELS_CODE_PANELS_H_
#define BITNET_KERNELS_CODE_PANELS_H_

#include <cstdint>

#include "integer_matmul.h"

namespace bitnet {

// Writes the blocks of one panel, [blocks][64], from `rows` rows (at most kPanelRows) of `inputs` codes that lie
// `stride` apart. Codes that the format does not hold spoil only their own row. Any thread.
void pack_panel(Format format, const int8_t* codes, int64_t stride, int64_t rows, int64_t inputs, int64_t blocks,
                uint8_t* to);

}  // namespace bitnet

#endif  // BITNET_KERNELS_CODE_PANELS_H_
