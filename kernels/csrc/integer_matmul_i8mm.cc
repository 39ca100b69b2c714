// NEON with i8mm (panel_i8mm.h).

#include "scaled_matmul.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod,i8mm"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm")
#endif

#include "panel_i8mm.h"
#include "panel_scaled.h"

namespace bitnet {

extern const MatmulKernels kI8mmInteger;
const MatmulKernels kI8mmInteger = {matmul<NeonI8mm>, sum, nullptr, scaled<NeonI8mm>};

}  // namespace bitnet

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __aarch64__
