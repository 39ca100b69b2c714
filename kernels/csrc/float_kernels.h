// The float32 loops of one instruction family: attention, bfloat16 output heads and products of training.

#ifndef BITNET_KERNELS_FLOAT_KERNELS_H_
#define BITNET_KERNELS_FLOAT_KERNELS_H_

#include "attention.h"
#include "attention_gradient.h"
#include "float_matmul.h"
#include "head.h"

namespace bitnet {

// Runs `times` rounds of products on registers, on the calling thread, and returns the number of products.
using Peak = int64_t (*)(int64_t times);

struct FloatKernels {
  AttentionKernels attention;
  AttentionGradientKernels attention_gradient;
  HeadRows head_rows;
  FloatMatmulKernels matmul;
  Peak peak;  // null where there is no such loop
};

}  // namespace bitnet

#endif  // BITNET_KERNELS_FLOAT_KERNELS_H_
