// The float32 result of a packed matrix: integer sums of groups, scaled while they are in registers or in cache.

#ifndef BITNET_KERNELS_SCALED_MATMUL_H_
#define BITNET_KERNELS_SCALED_MATMUL_H_

#include "integer_matmul.h"
#include "panel_scales.h"

namespace bitnet {

struct MatmulScales {
  ScaleMatrix matrix;
  ScaleMatrix minimum;                // of formats that have one
  const float* activation = nullptr;  // [m], or nullptr for none
};

// Writes out[m, n] = (sum over groups g, in order, of t[g, m, n]) * activation[m] with
//
//   t[g, m, n] = float(y[g, m, n]) * matrix[n, g]  (+ float(x_sums[m, g]) * minimum[n, g]  where there is a minimum),
//
// every product and sum rounded: the same bits as rescale of bitnet_kernels/reference.py. For the matrix panels
// [begin, end), of which there is at least one; p.y is not used.
void scaled_matmul(const MatmulKernels& kernels, const Problem& p, const MatmulScales& scales, float* out,
                   int64_t begin, int64_t end);

}  // namespace bitnet

#endif  // BITNET_KERNELS_SCALED_MATMUL_H_
