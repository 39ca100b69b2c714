// Which instruction sets this processor has.

#ifndef BITNET_KERNELS_ISA_H_
#define BITNET_KERNELS_ISA_H_

#include <string_view>

#include "integer_matmul.h"

namespace bitnet {

// The kernels of a named instruction set, or nullptr where the name is unknown or the processor lacks it.
const Kernels* find_kernels(std::string_view isa);

}  // namespace bitnet

// The available instruction sets, slowest first, separated by commas.
extern "C" const char* bitnet_kernels_available_isas();

#endif  // BITNET_KERNELS_ISA_H_
