// AVX-512 F.

#if defined(__x86_64__)

#include "float_lanes_avx512.h"

#include "attention_loops.h"
#include "float_kernels.h"
#include "head_loops.h"

namespace bitnet {
namespace {

struct Avx512 : Avx512Lanes {
  static constexpr int kScoreRows = 4, kMixVectors = 4;
  static constexpr int kHeadStreams = 8;
  static constexpr int kHeadRows = 4, kHeadXRows = 6;  // 24 accumulators, 4 widened weights, an input of 32 registers
};

}  // namespace

extern const FloatKernels kAvx512Floats;
const FloatKernels kAvx512Floats = {{AttentionLoops<Avx512>::chunk, AttentionLoops<Avx512>::merge}, head_rows<Avx512>};

}  // namespace bitnet

#endif  // __x86_64__
