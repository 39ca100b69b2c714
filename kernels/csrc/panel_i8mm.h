// NEON with i8mm: usdot multiplies unsigned fields, unmodified, with signed activations.

#ifndef BITNET_KERNELS_PANEL_I8MM_H_
#define BITNET_KERNELS_PANEL_I8MM_H_

#include "panel_neon.h"

namespace bitnet {
namespace {

struct NeonI8mm : NeonDot {
  static constexpr int slots(Format format, int rows) {
    return fields(format) == 2 && rows == 1 ? 2 : NeonDot::slots(format, rows);
  }
  static constexpr int32_t offset(Format format) { return bitnet::offset(format); }

  template <Format>
  static BITNET_INLINE Sums dot(Sums sums, Bytes fields, Bytes x) {
    return vusdotq_s32(sums, fields, vreinterpretq_s8_u8(x));
  }
};

}  // namespace
}  // namespace bitnet

#endif  // BITNET_KERNELS_PANEL_I8MM_H_
