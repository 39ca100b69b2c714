// NEON with the dot product instructions: sdot multiplies 16 signed bytes with 16 signed activations and adds groups of
// four to 4 int32 lanes. Fields stay below 128, or are made signed.

#ifndef BITNET_KERNELS_PANEL_NEON_H_
#define BITNET_KERNELS_PANEL_NEON_H_

#include <arm_neon.h>

#include "panel_fields.h"

namespace bitnet {
namespace {

struct NeonDot {
  using Bytes = uint8x16_t;
  using Sums = int32x4_t;
  using Floats = float32x4_t;
  static constexpr int kLanes = 4;
  // With two slots a binary field stands at 1 or 2, a ternary one at up to 8; 15 is the highest of four bits.
  static constexpr int slots(Format format, int rows) {
    return rows == 1 && (format == Format::kBinary || format == Format::kTernary2) ? 2 : 1;
  }
  static constexpr int kStreams = 2;
  static constexpr int kFusedRows = 2;
  static constexpr int few_rows(Format) { return 6; }
  static constexpr int kTilePanels = 1, kTileRows = 6;
  static constexpr int64_t partial_limit(Format) { return 0; }
  static constexpr int32_t offset(Format format) { return format == Format::kInt8 ? 0 : bitnet::offset(format); }

  static BITNET_INLINE Bytes load(const void* source) { return vld1q_u8(static_cast<const uint8_t*>(source)); }
  static BITNET_INLINE Bytes broadcast(const int8_t* x) {
    int32_t dword;
    std::memcpy(&dword, x, 4);
    return vreinterpretq_u8_s32(vdupq_n_s32(dword));
  }
  static BITNET_INLINE Bytes splat(int byte) { return vdupq_n_u8(static_cast<uint8_t>(byte)); }
  static BITNET_INLINE Bytes bit_and(Bytes a, Bytes b) { return vandq_u8(a, b); }
  static BITNET_INLINE Bytes min(Bytes a, Bytes b) { return vminq_u8(a, b); }
  static BITNET_INLINE Bytes subtract(Bytes a, Bytes b) { return vsubq_u8(a, b); }
  template <int kBits>
  static BITNET_INLINE Bytes shift_right(Bytes bytes) {
    return vshrq_n_u8(bytes, kBits);
  }
  static BITNET_INLINE Bytes look_up(const uint8_t* table, Bytes indices) {
    return vqtbl1q_u8(vld1q_u8(table), indices);
  }
  // The fields of int8 turn into codes: flipping the highest bit subtracts 128.
  template <Format kFormat>
  static BITNET_INLINE Sums dot(Sums sums, Bytes fields, Bytes x) {
    if constexpr (kFormat == Format::kInt8) fields = veorq_u8(fields, splat(128));
    return vdotq_s32(sums, vreinterpretq_s8_u8(fields), vreinterpretq_s8_u8(x));
  }
  template <Format>
  static BITNET_INLINE Sums finish(Sums sums) {
    return sums;
  }
  static BITNET_INLINE Sums zero() { return vdupq_n_s32(0); }
  static BITNET_INLINE Sums fill(int32_t sum) { return vdupq_n_s32(sum); }
  static BITNET_INLINE Sums add(Sums a, Sums b) { return vaddq_s32(a, b); }
  template <int kScale>
  static BITNET_INLINE Sums divide(Sums sums) {
    if constexpr (kScale == 1) {
      return sums;
    } else if constexpr (kScale % 2 == 0) {
      return divide<kScale / 2>(vshrq_n_s32(sums, 1));
    } else {
      return vmulq_s32(sums, vdupq_n_s32(inverse(kScale)));
    }
  }
  static BITNET_INLINE Sums load_sums(const int32_t* source) { return vld1q_s32(source); }
  static BITNET_INLINE void store(int32_t* target, Sums sums) { vst1q_s32(target, sums); }
  static BITNET_INLINE Floats to_floats(Sums sums) { return vcvtq_f32_s32(sums); }
  static BITNET_INLINE Floats load_floats(const float* source) { return vld1q_f32(source); }
  static BITNET_INLINE Floats splat_float(float value) { return vdupq_n_f32(value); }
  static BITNET_INLINE Floats multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
  static BITNET_INLINE Floats add_floats(Floats a, Floats b) { return vaddq_f32(a, b); }
  static BITNET_INLINE void store_floats(float* target, Floats values) { vst1q_f32(target, values); }
};

}  // namespace
}  // namespace bitnet

#endif  // BITNET_KERNELS_PANEL_NEON_H_
