// AVX2 with AVX-VNNI (panel_avxvnni.h).

#include "integer_matmul.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,avxvnni")
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 says so of its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace bitnet {
namespace {

#include "panel_fields.h"
#include "panel_avx2.h"
#include "panel_avxvnni.h"
#include "panel_matmul.h"

}  // namespace

const Kernels kAvxVnniKernels = {"avxvnni", matmul<AvxVnni>, sum};

}  // namespace bitnet

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
