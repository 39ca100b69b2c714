// NEON with dot products (panel_neon.h).

#include "integer_matmul.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

namespace bitnet {
namespace {

#include "panel_fields.h"
#include "panel_neon.h"
#include "panel_matmul.h"

}  // namespace

const Kernels kNeonKernels = {"neon", matmul<NeonDot>, sum};

}  // namespace bitnet

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __aarch64__
