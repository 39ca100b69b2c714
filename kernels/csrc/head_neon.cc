// NEON, which every aarch64 processor has: 16 lanes are four vectors.

#if defined(__aarch64__)

#include <arm_neon.h>

#define HEAD_TARGET
#include "head_rows.h"

namespace bitnet {
namespace {

struct NeonLanes {
  static constexpr int kStreams = 4;
  static constexpr int kRows = 2;  // 16 accumulators, 8 widened weights, 4 inputs of 32 registers
  static constexpr int kXRows = 2;
  float32x4_t v[4];

  HEAD_INLINE static NeonLanes zero() {
    const float32x4_t none = vdupq_n_f32(0);
    return {{none, none, none, none}};
  }
  HEAD_INLINE static NeonLanes load(const float* x) {
    return {{vld1q_f32(x), vld1q_f32(x + 4), vld1q_f32(x + 8), vld1q_f32(x + 12)}};
  }
  HEAD_INLINE static NeonLanes widen(const uint16_t* w) {
    return {{widen4(w), widen4(w + 4), widen4(w + 8), widen4(w + 12)}};
  }
  HEAD_INLINE static NeonLanes fma(const NeonLanes& a, const NeonLanes& b, const NeonLanes& c) {
    return {{vfmaq_f32(c.v[0], a.v[0], b.v[0]), vfmaq_f32(c.v[1], a.v[1], b.v[1]),
             vfmaq_f32(c.v[2], a.v[2], b.v[2]), vfmaq_f32(c.v[3], a.v[3], b.v[3])}};
  }
  HEAD_INLINE float sum() const {
    const float32x4_t four = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
  }
  HEAD_INLINE static float32x4_t widen4(const uint16_t* w) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(w), 16));
  }
};

}  // namespace

HeadRows head_rows_neon() { return head_rows<NeonLanes>; }

}  // namespace bitnet

#endif  // __aarch64__
