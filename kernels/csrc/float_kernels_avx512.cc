// AVX-512 F.

#if defined(__x86_64__)

#include "float_lanes_avx512.h"

#include "attention_gradient_loops.h"
#include "attention_loops.h"
#include "float_kernels.h"
#include "float_matmul_loops.h"
#include "head_loops.h"

namespace bitnet {
namespace {

struct Avx512 : Avx512Lanes {
  static constexpr int kScoreRows = 4, kMixVectors = 4;
  static constexpr int kHeadStreams = 8;
  static constexpr int kHeadRows = 4, kHeadXRows = 6;  // 24 accumulators, 4 widened weights, an input of 32 registers
  static constexpr int kProductRows = 12, kProductVectors = 2;  // 24 sums, 2 columns, a row
};

}  // namespace

int64_t float_peak_avx512(int64_t times);  // dot_peak.cc

extern const FloatKernels kAvx512Floats;
const FloatKernels kAvx512Floats = {
    {AttentionLoops<Avx512>::chunk, AttentionLoops<Avx512>::merge},
    AttentionGradientLoops<Avx512>::kernels(),
    head_rows<Avx512>,
    FloatMatmulLoops<Avx512>::kernels(),
    float_peak_avx512,
};

}  // namespace bitnet

#endif  // __x86_64__
