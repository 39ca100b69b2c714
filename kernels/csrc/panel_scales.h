// The scales of a panel in the order of its sums: [groups][16 rows], float32.
//
// A matrix of scales is stored [n, groups], as users index it, so the scales of the rows of a panel lie groups apart;
// a group needs those of all 16 rows at once. They are transposed panel by panel, in the first-level cache.

#ifndef BITNET_KERNELS_PANEL_SCALES_H_
#define BITNET_KERNELS_PANEL_SCALES_H_

#include <cstdint>

#include "float16.h"

namespace bitnet {

struct ScaleMatrix {
  const void* data = nullptr;  // float32 or float16 [n, groups], or one number; null for none
  bool half = false;           // float16
  int64_t stride = 0;          // scales of a row of the matrix (groups), or 0 where one number serves all rows
  Widen widen = nullptr;
};

// Writes to[groups][kPanelRows] for the matrix rows [first, first + rows), at most kPanelRows; zero beyond them.
void panel_scales(const ScaleMatrix& scales, int64_t groups, int64_t first, int64_t rows, float* to);

}  // namespace bitnet

#endif  // BITNET_KERNELS_PANEL_SCALES_H_
