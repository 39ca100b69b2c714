// float16 numbers as float32. Every float16 is a float32, so all conversions give the same numbers.

#ifndef BITNET_KERNELS_FLOAT16_H_
#define BITNET_KERNELS_FLOAT16_H_

#include <cstdint>

namespace bitnet {

// Writes floats[i] = halves[i] (the bits of a float16), subnormal numbers included in every rounding mode.
using Widen = void (*)(const uint16_t* halves, int64_t count, float* floats);

void widen_scalar(const uint16_t* halves, int64_t count, float* floats);
#if defined(__x86_64__)
void widen_f16c(const uint16_t* halves, int64_t count, float* floats);  // with AVX2
#elif defined(__aarch64__)
void widen_neon(const uint16_t* halves, int64_t count, float* floats);
#endif

}  // namespace bitnet

#endif  // BITNET_KERNELS_FLOAT16_H_
