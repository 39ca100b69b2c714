// AVX2 (panel_avx2.h).

#include "integer_matmul.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 says so of its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace bitnet {
namespace {

#include "panel_fields.h"
#include "panel_avx2.h"
#include "panel_matmul.h"

}  // namespace

const Kernels kAvx2Kernels = {"avx2", matmul<Avx2>, sum};

}  // namespace bitnet

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
