#include "float16.h"

#include <cstring>

#if defined(__x86_64__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // false positives of gcc 12 in its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace bitnet {
namespace {

float widen_one(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, size = half & 0x7fffu;
  uint32_t bits;
  if (size >= 0x7c00) {  // infinity, and NaN, which becomes a quiet one
    bits = size << 13 | 0x7f800000 | (size > 0x7c00 ? 0x400000 : 0);
  } else if (size >= 0x400) {
    bits = (size << 13) + (112u << 23);
  } else {  // zero and subnormal numbers: multiples of 2^-24, normal as float32
    const float value = static_cast<float>(size) * 0x1p-24f;
    std::memcpy(&bits, &value, sizeof(bits));
  }
  bits |= sign;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace

void widen_scalar(const uint16_t* halves, int64_t count, float* floats) {
  for (int64_t i = 0; i < count; ++i) floats[i] = widen_one(halves[i]);
}

#if defined(__x86_64__)

// Eight at a time also where vectors are longer: panel_scales writes eight at a time, and a load that spans two stores
// waits for them to leave the store buffer.
__attribute__((target("avx2,f16c"))) void widen_f16c(const uint16_t* halves, int64_t count, float* floats) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i));
    _mm256_storeu_ps(floats + i, _mm256_cvtph_ps(eight));
  }
  widen_scalar(halves + i, count - i, floats + i);
}

#elif defined(__aarch64__)

void widen_neon(const uint16_t* halves, int64_t count, float* floats) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) vst1q_f32(floats + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves + i))));
  widen_scalar(halves + i, count - i, floats + i);
}

#endif

}  // namespace bitnet
