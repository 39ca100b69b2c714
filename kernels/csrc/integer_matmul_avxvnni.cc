// AVX2 with AVX-VNNI (panel_avxvnni.h).

#include "scaled_matmul.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,avxvnni")
#pragma GCC diagnostic ignored "-Wuninitialized"  // false positives of gcc 12 in its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "panel_avxvnni.h"
#include "panel_scaled.h"

namespace bitnet {

extern const MatmulKernels kAvxVnniInteger;
const MatmulKernels kAvxVnniInteger = {matmul<AvxVnni>, sum, nullptr, scaled<AvxVnni>};

}  // namespace bitnet

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
