// The float32 result of a packed matrix: integer sums of a tile, rescaled while they are in cache.

#ifndef BITNET_KERNELS_SCALED_MATMUL_H_
#define BITNET_KERNELS_SCALED_MATMUL_H_

#include "integer_matmul.h"

namespace bitnet {

struct Scales {
  const float* matrix;      // [n, groups], or one number
  int64_t stride;           // scales of a row of the matrix (groups), or 0 where one number serves all rows
  const float* activation;  // [m], or nullptr for none
};

// Writes out[m, n] = (sum over groups g, in order, of float(y[g, m, n]) * matrix[n, g]) * activation[m], every product
// and sum rounded: the same bits as rescale of bitnet_kernels/reference.py. For the matrix panels [begin, end); p.y is
// not used.
void scaled_matmul(const MatmulKernels& kernels, const Problem& p, const Scales& scales, float* out, int64_t begin,
                   int64_t end);

}  // namespace bitnet

#endif  // BITNET_KERNELS_SCALED_MATMUL_H_
