// AVX2 with FMA.

#if defined(__x86_64__)

#include "float_lanes_avx2.h"

#include "attention_gradient_loops.h"
#include "attention_loops.h"
#include "float_kernels.h"
#include "float_matmul_loops.h"
#include "head_loops.h"

namespace bitnet {
namespace {

struct Avx2 : Avx2Lanes {
  static constexpr int kScoreRows = 2, kMixVectors = 1;  // 8 sums: there are 16 registers
  static constexpr int kHeadStreams = 4;
  static constexpr int kHeadRows = 2, kHeadXRows = 2;  // 8 accumulators, 4 widened weights, 2 inputs of 16 registers
  static constexpr int kProductRows = 6, kProductVectors = 1;  // 12 sums, 2 columns, a row
};

}  // namespace

int64_t float_peak_avx2(int64_t times);  // dot_peak.cc

extern const FloatKernels kAvx2Floats;
const FloatKernels kAvx2Floats = {
    {AttentionLoops<Avx2>::chunk, AttentionLoops<Avx2>::merge},
    AttentionGradientLoops<Avx2>::kernels(),
    head_rows<Avx2>,
    FloatMatmulLoops<Avx2>::kernels(),
    float_peak_avx2,
};

}  // namespace bitnet

#endif  // __x86_64__
