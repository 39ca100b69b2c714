// AVX-512 with VNNI and VBMI: the digits of ternary5 are looked up.

#include "scaled_matmul.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")
#pragma GCC diagnostic ignored "-Wuninitialized"  // false positives of gcc 12 in its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "panel_avx512vbmi.h"
#include "panel_scaled.h"

namespace bitnet {

void matmul_avx512vbmi(const Problem& p, int64_t begin, int64_t end) {
  if (p.format != Format::kTernary5) return matmul_avx512vnni(p, begin, end);
  matmul_format<Avx512Vbmi, Format::kTernary5>(p, begin, end);
}

void scaled_avx512vbmi(const Problem& p, const MatmulScales& s, float* out, int64_t begin, int64_t end, float* scratch) {
  if (p.format != Format::kTernary5) return scaled_avx512vnni(p, s, out, begin, end, scratch);
  scaled_format<Avx512Vbmi, Format::kTernary5>(p, s, out, begin, end, scratch);
}

extern const MatmulKernels kAvx512VbmiInteger;
const MatmulKernels kAvx512VbmiInteger = {matmul_avx512vbmi, sum, nullptr, scaled_avx512vbmi};

}  // namespace bitnet

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
