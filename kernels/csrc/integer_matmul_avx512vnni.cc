// AVX-512 with VNNI (panel_avx512.h).

#include "scaled_matmul.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni")
#pragma GCC diagnostic ignored "-Wuninitialized"  // false positives of gcc 12 in its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "panel_avx512.h"
#include "panel_scaled.h"

namespace bitnet {

void matmul_avx512vnni(const Problem& p, int64_t begin, int64_t end) { matmul<Avx512Vnni>(p, begin, end); }

void scaled_avx512vnni(const Problem& p, const MatmulScales& s, float* out, int64_t begin, int64_t end, float* scratch) {
  scaled<Avx512Vnni>(p, s, out, begin, end, scratch);
}

extern const MatmulKernels kAvx512VnniInteger;
const MatmulKernels kAvx512VnniInteger = {matmul_avx512vnni, sum, nullptr, scaled_avx512vnni};

}  // namespace bitnet

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
