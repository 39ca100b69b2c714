// Absmax integers of float activations, a row at a time.

#ifndef BITNET_KERNELS_ACTIVATIONS_H_
#define BITNET_KERNELS_ACTIVATIONS_H_

#include <cstdint>

namespace bitnet {

// codes[i] = clip(round(x[i] s), -128, 127) with s = 127 / max(max|x|, 1e-5), half to even; returns 1 / s. The same
// bits as quantize_activations of bitnet_kernels/reference.py, NaN and infinity included.
float quantize_row(const float* x, int64_t count, int8_t* codes);

// Likewise with 16 bits, s = 32512 / max(max|x|, 1e-5), as digits: code = 256 high[i] + low[i].
float quantize_row_digits(const float* x, int64_t count, int8_t* high, int8_t* low);

}  // namespace bitnet

#endif  // BITNET_KERNELS_ACTIVATIONS_H_
