// The float32 loops of one instruction family: attention and bfloat16 output heads.

#ifndef BITNET_KERNELS_FLOAT_KERNELS_H_
#define BITNET_KERNELS_FLOAT_KERNELS_H_

#include "attention.h"
#include "head.h"

namespace bitnet {

struct FloatKernels {
  AttentionKernels attention;
  HeadRows head_rows;
};

}  // namespace bitnet

#endif  // BITNET_KERNELS_FLOAT_KERNELS_H_
