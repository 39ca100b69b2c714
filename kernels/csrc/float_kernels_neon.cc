// NEON.

#if defined(__aarch64__)

#include "float_lanes_neon.h"

#include "attention_gradient_loops.h"
#include "attention_loops.h"
#include "float_kernels.h"
#include "float_matmul_loops.h"
#include "head_loops.h"

namespace bitnet {
namespace {

struct Neon : NeonLanes {
  static constexpr int kScoreRows = 4, kMixVectors = 1;
  static constexpr int kHeadStreams = 4;
  static constexpr int kHeadRows = 2, kHeadXRows = 2;  // 16 accumulators, 8 widened weights, 4 inputs of 32 registers
  static constexpr int kProductRows = 6, kProductVectors = 1;  // 24 sums, 4 columns, a row
};

}  // namespace

extern const FloatKernels kNeonFloats;
const FloatKernels kNeonFloats = {
    {AttentionLoops<Neon>::chunk, AttentionLoops<Neon>::merge},
    AttentionGradientLoops<Neon>::kernels(),
    head_rows<Neon>,
    FloatMatmulLoops<Neon>::kernels(),
    nullptr,
};

}  // namespace bitnet

#endif  // __aarch64__
