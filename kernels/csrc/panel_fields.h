// The fields of a block of a packed matrix, for the kernels of panel_matmul.h.
//
// The panel_*.h headers are compiled for the instruction set of the file that includes them, integer_matmul_<name>.cc.
// That file includes every standard header before it selects the target, so that no inline function of the standard
// library is compiled for it: the linker may keep that copy for the whole library.

#ifndef BITNET_KERNELS_PANEL_FIELDS_H_
#define BITNET_KERNELS_PANEL_FIELDS_H_

#include <cstring>
#include <type_traits>

#include "integer_matmul.h"

namespace bitnet {
namespace {

#define BITNET_INLINE inline BITNET_INLINE_BODY
#define BITNET_INLINE_BODY __attribute__((always_inline))

// Calls body(0), .., body(kCount - 1), the index a compile-time constant.
template <int kCount, int kIndex = 0, typename Body>
BITNET_INLINE void unrolled(Body&& body) {
  if constexpr (kIndex < kCount) {
    body(std::integral_constant<int, kIndex>());
    unrolled<kCount, kIndex + 1>(body);
  }
}

constexpr int power(int base, int exponent) { return exponent == 0 ? 1 : base * power(base, exponent - 1); }

// The factor that divides multiples of an odd number by it, modulo 2^32 (Newton's iteration doubles the right bits).
constexpr int32_t inverse(uint32_t odd) {
  uint32_t factor = odd;  // right in three bits
  for (int bits = 3; bits < 32; bits *= 2) factor *= 2 - odd * factor;
  return static_cast<int32_t>(factor);
}

// Takes the fields of a vector of packed bytes, the last one first. Field s comes out times scale(s mod kSlots) =
// base^(s mod kSlots): it stands where a mask alone, or one shift for kSlots fields, leaves it. The fields of a slot
// share an accumulator, which is divided by the scale in the end (exact: every product is a multiple of it). One slot
// gives plain fields.
template <typename Isa, Format kFormat, int kSlots>
struct Fields {
  static constexpr int scale(int slot) { return power(field_base(kFormat), slot); }

  typename Isa::Bytes bytes;

  BITNET_INLINE void start(typename Isa::Bytes packed) { bytes = packed; }

  template <int s>
  BITNET_INLINE typename Isa::Bytes take() {
    constexpr int kSlot = s % kSlots, kShift = (8 / fields(kFormat)) * (s - kSlot);
    const auto mask = Isa::splat((field_base(kFormat) - 1) * scale(kSlot));
    if constexpr (fields(kFormat) == 1) {
      return bytes;
    } else if constexpr (kShift == 0) {
      return Isa::bit_and(bytes, mask);
    } else {
      return Isa::bit_and(Isa::template shift_right<kShift>(bytes), mask);
    }
  }
};

// The least of v, v - 3^s and v - 2 3^s, as unsigned bytes, is v mod 3^s for v < 3^(s + 1): differences below zero wrap
// around to large numbers. What it takes from v is digit s in place.
template <typename Isa, int kSlots>
struct Fields<Isa, Format::kTernary5, kSlots> {
  static_assert(kSlots == 1 || kSlots == 5, "digits are plain, or all in place");
  static constexpr int scale(int slot) { return power(3, slot); }

  typename Isa::Bytes bytes;

  BITNET_INLINE void start(typename Isa::Bytes packed) { bytes = packed; }

  template <int s>
  BITNET_INLINE typename Isa::Bytes take() {
    if constexpr (s == 0) return bytes;
    const auto unit = Isa::splat(power(3, s));
    const auto once = Isa::min(bytes, Isa::subtract(bytes, unit));
    const auto rest = Isa::min(once, Isa::subtract(once, unit));
    const auto digit = Isa::subtract(bytes, rest);
    bytes = rest;
    if constexpr (kSlots == 5) return digit;
    // A digit in place is one of 0, 3, 6, 9, 18, 27, 54, 81, 162; the low four bits tell 1, 2 and 0 times 3^s apart.
    alignas(16) static constexpr uint8_t kDigits[16] = {0, 1, 2, 1, 0, 0, 2, 0, 0, 1, 0, 1};
    return Isa::look_up(kDigits, Isa::bit_and(digit, Isa::splat(15)));
  }
};

}  // namespace
}  // namespace bitnet

#endif  // BITNET_KERNELS_PANEL_FIELDS_H_
