// AVX2 with AVX-VNNI: vpdpbusd in its VEX form adds groups of four products to int32.

#ifndef BITNET_KERNELS_PANEL_AVXVNNI_H_
#define BITNET_KERNELS_PANEL_AVXVNNI_H_

#include "panel_avx2.h"

namespace bitnet {
namespace {

struct AvxVnni : Avx2 {
  static constexpr int slots(Format format, int rows) {
    return format == Format::kTernary5 || rows > 1 ? 1 : std::min(2, fields(format));  // of sixteen registers
  }
  static constexpr int few_rows(Format) { return 4; }
  static constexpr int64_t partial_limit(Format) { return 0; }

  template <Format>
  static BITNET_INLINE Sums dot(Sums sums, Bytes fields, Bytes x) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(fields), "x"(x));  // gcc 12 copies sums around the intrinsic
    return sums;
  }
  template <Format>
  static BITNET_INLINE Sums finish(Sums sums) {
    return sums;
  }
};

}  // namespace
}  // namespace bitnet

#endif  // BITNET_KERNELS_PANEL_AVXVNNI_H_
