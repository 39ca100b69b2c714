// The float32 result of a packed matrix: integer sums of a tile, rescaled while they are in cache.

#ifndef BITNET_KERNELS_SCALED_MATMUL_H_
#define BITNET_KERNELS_SCALED_MATMUL_H_

#include "integer_matmul.h"

namespace bitnet {

// Writes out[m, n] = sum over groups g, in order, of float(y[g, m, n]) * scale[n, g], every product and sum rounded:
// the same bits as rescale of bitnet_kernels/reference.py. For the matrix panels [begin, end); p.y is not used.
// scale_stride is the number of scales of a row of the matrix (groups), or 0 where one scale serves all rows.
void scaled_matmul(const Kernels& kernels, const Problem& p, const float* scale, int64_t scale_stride, float* out,
                   int64_t begin, int64_t end);

}  // namespace bitnet

#endif  // BITNET_KERNELS_SCALED_MATMUL_H_
