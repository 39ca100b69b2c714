// AVX2 (panel_avx2.h).

#include "scaled_matmul.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#pragma GCC diagnostic ignored "-Wuninitialized"  // false positives of gcc 12 in its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "panel_avx2.h"
#include "panel_scaled.h"

namespace bitnet {

extern const MatmulKernels kAvx2Integer;
const MatmulKernels kAvx2Integer = {matmul<Avx2>, sum, nullptr, scaled<Avx2>};

}  // namespace bitnet

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
