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

// Adding 1.5 * 2^23 leaves the integer nearest to a number below 2^22 in the low bits of the sum, half to even.
constexpr float kShift = 12582912.0f;
constexpr int32_t kShiftBits = 0x4b400000;

// write(i, bits of x[i] s + kShift) for all i, with s = peak / max(max|x|, 1e-5); returns 1 / s. Where a number is not
// finite x s is 0 or NaN, and NaN has the code 0.
template <typename Write>
float quantize(const float* x, int64_t count, float peak, const Write& write) {
  const float size = absmax(x, count);
  const float s = peak / (size < kEpsilon ? kEpsilon : size);
  if (!std::isfinite(size)) {
    for (int64_t i = 0; i < count; ++i) write(i, kShiftBits);
    return 1.0f / s;
  }
  for (int64_t i = 0; i < count; ++i) {
    const float shifted = x[i] * s + kShift;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    write(i, bits);
  }
  return 1.0f / s;
}

}  // namespace

float quantize_row(const float* x, int64_t count, int8_t* codes) {
  return quantize(x, count, 127.0f, [=](int64_t i, int32_t bits) { codes[i] = static_cast<int8_t>(bits); });
}

float quantize_row_digits(const float* x, int64_t count, int8_t* high, int8_t* low) {
  return quantize(x, count, 32512.0f, [=](int64_t i, int32_t bits) {
    low[i] = static_cast<int8_t>(bits);
    high[i] = static_cast<int8_t>((bits - kShiftBits + 128) >> 8);
  });
}

}  // namespace bitnet
