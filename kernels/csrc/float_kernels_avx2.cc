// AVX2 with FMA.

#if defined(__x86_64__)

#include "float_lanes_avx2.h"

#include "attention_loops.h"
#include "float_kernels.h"
#include "head_loops.h"

namespace bitnet {
namespace {

struct Avx2 : Avx2Lanes {
  static constexpr int kScoreRows = 2, kMixVectors = 1;  // 8 sums: there are 16 registers
  static constexpr int kHeadStreams = 4;
  static constexpr int kHeadRows = 2, kHeadXRows = 2;  // 8 accumulators, 4 widened weights, 2 inputs of 16 registers
};

}  // namespace

extern const FloatKernels kAvx2Floats;
const FloatKernels kAvx2Floats = {{AttentionLoops<Avx2>::chunk, AttentionLoops<Avx2>::merge}, head_rows<Avx2>};

}  // namespace bitnet

#endif  // __x86_64__
