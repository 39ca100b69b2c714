// Any processor.

#include "float_lanes_scalar.h"

#include "attention_loops.h"
#include "float_kernels.h"
#include "head_loops.h"

namespace bitnet {
namespace {

struct Scalar : ScalarLanes {
  static constexpr int kScoreRows = 1, kMixVectors = 1;
  static constexpr int kHeadStreams = 1;
  static constexpr int kHeadRows = 1, kHeadXRows = 1;
};

}  // namespace

extern const FloatKernels kScalarFloats;
const FloatKernels kScalarFloats = {{AttentionLoops<Scalar>::chunk, AttentionLoops<Scalar>::merge}, head_rows<Scalar>};

}  // namespace bitnet
