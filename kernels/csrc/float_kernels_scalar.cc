// Any processor.

#include "float_lanes_scalar.h"

#include "attention_gradient_loops.h"
#include "attention_loops.h"
#include "float_kernels.h"
#include "float_matmul_loops.h"
#include "head_loops.h"

namespace bitnet {
namespace {

struct Scalar : ScalarLanes {
  static constexpr int kScoreRows = 1, kMixVectors = 1;
  static constexpr int kHeadStreams = 1;
  static constexpr int kHeadRows = 1, kHeadXRows = 1;
  static constexpr int kProductRows = 1, kProductVectors = 1;
};

}  // namespace

extern const FloatKernels kScalarFloats;
const FloatKernels kScalarFloats = {
    {AttentionLoops<Scalar>::chunk, AttentionLoops<Scalar>::merge},
    AttentionGradientLoops<Scalar>::kernels(),
    head_rows<Scalar>,
    FloatMatmulLoops<Scalar>::kernels(),
    nullptr,
};

}  // namespace bitnet
