// AMX for many rows of x, AVX-512 for few (panel_amx.h).

#include "scaled_matmul.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,amx-tile,amx-int8"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,amx-tile,amx-int8")
#pragma GCC diagnostic ignored "-Wuninitialized"  // false positives of gcc 12 in its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "panel_amx.h"

namespace bitnet {

extern const MatmulKernels kAmxInteger;
const MatmulKernels kAmxInteger = {matmul_amx, sum, nullptr, scaled_avx512vbmi};

}  // namespace bitnet

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
