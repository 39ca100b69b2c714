// 16 floats with NEON, which every aarch64 processor has: four registers of four lanes.
// float_lanes.h lists the operations.

#ifndef BITNET_KERNELS_FLOAT_LANES_NEON_H_
#define BITNET_KERNELS_FLOAT_LANES_NEON_H_

#include <arm_neon.h>

#include <cstdint>

#define BITNET_TARGET
#include "float_lanes.h"

namespace bitnet {
namespace {

struct NeonLanes {
  struct Vec {
    float32x4_t part[4];
  };
  using Part = float32x4_t;
  static constexpr int kParts = 4;

  template <typename F>
  BITNET_INLINE static Vec each(F f) {
    return {{f(0), f(1), f(2), f(3)}};
  }
  BITNET_INLINE static float32x4_t max(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }

  BITNET_INLINE static Vec load(const float* x) {
    return each([&](int i) { return vld1q_f32(x + 4 * i); });
  }
  BITNET_INLINE static void store(float* x, Vec a) {
    BITNET_UNROLL
    for (int i = 0; i < 4; ++i) vst1q_f32(x + 4 * i, a.part[i]);
  }
  BITNET_INLINE static Vec set1(float x) {
    return each([&](int) { return vdupq_n_f32(x); });
  }
  BITNET_INLINE static Vec add(Vec a, Vec b) {
    return each([&](int i) { return vaddq_f32(a.part[i], b.part[i]); });
  }
  BITNET_INLINE static Vec sub(Vec a, Vec b) {
    return each([&](int i) { return vsubq_f32(a.part[i], b.part[i]); });
  }
  BITNET_INLINE static Vec mul(Vec a, Vec b) {
    return each([&](int i) { return vmulq_f32(a.part[i], b.part[i]); });
  }
  BITNET_INLINE static Vec fma(Vec a, Vec b, Vec c) {
    return each([&](int i) { return vfmaq_f32(c.part[i], a.part[i], b.part[i]); });
  }
  BITNET_INLINE static Vec max(Vec a, Vec b) {
    return each([&](int i) { return max(a.part[i], b.part[i]); });
  }
  BITNET_INLINE static Vec select_less(Vec a, Vec b, Vec x, Vec y) {
    return each([&](int i) { return vbslq_f32(vcltq_f32(a.part[i], b.part[i]), x.part[i], y.part[i]); });
  }
  BITNET_INLINE static Vec load_bfloat16(const uint16_t* x) {
    return each([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(x + 4 * i), 16)); });
  }
  BITNET_INLINE static Vec load_int8(const int8_t* x) {
    const int8x16_t bytes = vld1q_s8(x);
    const int16x8_t halves[2] = {vmovl_s8(vget_low_s8(bytes)), vmovl_s8(vget_high_s8(bytes))};
    return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(halves[0]))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(halves[0]))),
             vcvtq_f32_s32(vmovl_s16(vget_low_s16(halves[1]))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(halves[1])))}};
  }
  BITNET_INLINE static Vec add_to_exponent(Vec y, Vec t) {
    return each([&](int i) {
      const uint32x4_t power = vshlq_n_u32(vreinterpretq_u32_f32(t.part[i]), 23);
      return vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(y.part[i]), power));
    });
  }
  BITNET_INLINE static float first(Vec a) { return vgetq_lane_f32(a.part[0], 0); }
  BITNET_INLINE static float sum_of(Vec a) {
    const float32x4_t quarter = vaddq_f32(vaddq_f32(a.part[0], a.part[2]), vaddq_f32(a.part[1], a.part[3]));
    const float32x2_t pair = vadd_f32(vget_low_f32(quarter), vget_high_f32(quarter));
    return vget_lane_f32(vpadd_f32(pair, pair), 0);
  }
  BITNET_INLINE static float max_of(Vec a) {
    float lane[4];
    vst1q_f32(lane, max(max(a.part[0], a.part[2]), max(a.part[1], a.part[3])));
    const float even = lane[0] > lane[2] ? lane[0] : lane[2], odd = lane[1] > lane[3] ? lane[1] : lane[3];
    return even > odd ? even : odd;
  }
  BITNET_INLINE static void transpose(Vec x[4]) {
    const Vec a = x[0], b = x[1], c = x[2], d = x[3];
    BITNET_UNROLL
    for (int i = 0; i < 4; ++i) x[i] = {{a.part[i], b.part[i], c.part[i], d.part[i]}};
  }

  BITNET_INLINE static Part load_part(const float* x) { return vld1q_f32(x); }
  BITNET_INLINE static void store_part(float* x, Part a) { vst1q_f32(x, a); }
  BITNET_INLINE static Part set1_part(float x) { return vdupq_n_f32(x); }
  BITNET_INLINE static Part fma_part(Part a, Part b, Part c) { return vfmaq_f32(c, a, b); }
  BITNET_INLINE static Part repeat4(const float* x) { return vld1q_f32(x); }
  BITNET_INLINE static Part pairs(Part a, Part b) {
    const float32x4_t low = vcombine_f32(vget_low_f32(a), vget_low_f32(b));
    return vaddq_f32(low, vcombine_f32(vget_high_f32(a), vget_high_f32(b)));
  }
  BITNET_INLINE static Part sum4(const Part a[4]) { return vpaddq_f32(pairs(a[0], a[1]), pairs(a[2], a[3])); }
};

}  // namespace
}  // namespace bitnet

#endif  // BITNET_KERNELS_FLOAT_LANES_NEON_H_
