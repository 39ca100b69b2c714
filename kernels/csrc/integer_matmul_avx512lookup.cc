// AVX-512 with VNNI and VBMI: binary products of many rows are looked up.

#include "integer_matmul.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 says so of its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace bitnet {
namespace {

#include "panel_fields.h"
#include "panel_avx512.h"
#include "panel_avx512vbmi.h"
#include "panel_matmul.h"
#include "panel_lookup.h"

}  // namespace

const Kernels kAvx512LookupKernels = {"avx512lookup", matmul_lookup, sum, table_rows};

}  // namespace bitnet

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
