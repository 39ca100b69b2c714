#include "activations.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace bitnet {
namespace {

constexpr float kEpsilon = 1e-5f;

// max|x| by the bits of |x|, which order like the numbers, with NaN above infinity.
float absmax(const float* x, int64_t count) {
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    largest = std::max(largest, bits & 0x7fffffff);
  }
  float value;
  std::memcpy(&value, &largest, sizeof(value));
  return value;
}

}  // namespace

float quantize_row(const float* x, int64_t count, int8_t* codes) {
  const float size = absmax(x, count);
  const float s = 127.0f / (size < kEpsilon ? kEpsilon : size);
  if (!std::isfinite(size)) {
    // x s is 0 or NaN, and NaN has the code 0.
    std::memset(codes, 0, count);
    return 1.0f / s;
  }
  // Adding 1.5 * 2^23 leaves the integer nearest to |x s| <= 128 in the low bits, half to even.
  constexpr float kShift = 12582912.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float shifted = x[i] * s + kShift;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    codes[i] = static_cast<int8_t>(bits);
  }
  return 1.0f / s;
}

}  // namespace bitnet
