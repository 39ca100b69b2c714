// NEON.

#if defined(__aarch64__)

#include "float_lanes_neon.h"

#include "attention_loops.h"
#include "float_kernels.h"
#include "head_loops.h"

namespace bitnet {
namespace {

struct Neon : NeonLanes {
  static constexpr int kScoreRows = 4, kMixVectors = 1;
  static constexpr int kHeadStreams = 4;
  static constexpr int kHeadRows = 2, kHeadXRows = 2;  // 16 accumulators, 8 widened weights, 4 inputs of 32 registers
};

}  // namespace

extern const FloatKernels kNeonFloats;
const FloatKernels kNeonFloats = {{AttentionLoops<Neon>::chunk, AttentionLoops<Neon>::merge}, head_rows<Neon>};

}  // namespace bitnet

#endif  // __aarch64__
