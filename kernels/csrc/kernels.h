// The table of kernels: one row per instruction set.

#ifndef BITNET_KERNELS_KERNELS_H_
#define BITNET_KERNELS_KERNELS_H_

#include <cstdint>
#include <string_view>

#include "compiler.h"
#include "float16.h"
#include "float_kernels.h"
#include "integer_matmul.h"

namespace bitnet {

struct Kernels {
  const char* isa;
  bool available;                 // on this processor
  const MatmulKernels* integer;   // int8 activations
  const MatmulKernels* sign;      // activations -1 and 1, as bits (sign_matmul.h)
  const FloatKernels* floats;     // attention and output heads
  Peak dot_peak;                  // null where there is no such loop
  Widen widen;                    // float16 to float32
};

// The kernels of a named instruction set; null for a name that is unknown or not available on this processor.
const Kernels* find_kernels(std::string_view isa);

}  // namespace bitnet

// Instruction sets separated by commas, slowest first: those available on this processor, and all that this library
// was compiled with. Static strings.
extern "C" BITNET_EXPORT const char* bitnet_kernels_available_isas() noexcept;
extern "C" BITNET_EXPORT const char* bitnet_kernels_known_isas() noexcept;

#endif  // BITNET_KERNELS_KERNELS_H_
