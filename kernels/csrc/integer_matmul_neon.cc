// NEON with dot products (panel_neon.h).

#include "scaled_matmul.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#include "panel_neon.h"
#include "panel_scaled.h"

namespace bitnet {

extern const MatmulKernels kNeonInteger;
const MatmulKernels kNeonInteger = {matmul<NeonDot>, sum, nullptr, scaled<NeonDot>};

}  // namespace bitnet

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __aarch64__
