#include "kv_cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "threads.h"

namespace bitnet {
namespace {

constexpr int64_t kSerialElements = int64_t{1} << 14;  // of new keys, below which one thread is as fast as two
constexpr float kPeak = 127.0f;

// Rounded to nearest, half to even.
uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Codes of a head and their scale, max|x| (1 / 127); a scale that is not finite has codes 0 (quantize_kv in Python).
float quantize_head(const float* x, int64_t size, int8_t* codes) {
  float largest = 0.0f;
  bool nan = false;
  for (int64_t i = 0; i < size; ++i) {
    largest = std::max(largest, std::fabs(x[i]));
    nan = nan || std::isnan(x[i]);
  }
  const float scale = nan ? NAN : largest * (1.0f / kPeak);
  if (!std::isfinite(scale)) {
    std::memset(codes, 0, size);
    return scale;
  }
  const float divisor = scale > 0.0f ? scale : 1.0f;
  for (int64_t i = 0; i < size; ++i) {
    codes[i] = static_cast<int8_t>(std::clamp(std::nearbyint(x[i] / divisor), -kPeak, kPeak));
  }
  return scale;
}

// A head into element `at` of an array of the cache, its scale into scale[head].
void store(KvType type, const float* x, int64_t size, void* array, int64_t head, float* scale) {
  const int64_t at = head * size;
  switch (type) {
    case KvType::kFloat32: std::memcpy(static_cast<float*>(array) + at, x, size * sizeof(float)); break;
    case KvType::kBfloat16:
      for (int64_t i = 0; i < size; ++i) static_cast<uint16_t*>(array)[at + i] = to_bfloat16(x[i]);
      break;
    case KvType::kInt8: scale[head] = quantize_head(x, size, static_cast<int8_t*>(array) + at); break;
  }
}

}  // namespace

int64_t first_position(const AttentionProblem& p, const NewTokens& tokens, int64_t sequence) {
  return std::clamp<int64_t>(tokens.start[sequence], 0, p.room - p.tokens);
}

void append(const AttentionProblem& p, const NewTokens& tokens, const CacheArrays& cache) {
  const auto token = [&](int64_t index) {
    const int64_t sequence = index / p.tokens, size = p.head_size;
    const int64_t position = p.cache_row(sequence) * p.room + first_position(p, tokens, sequence) + index % p.tokens;
    thread_local std::vector<float> rotated;
    rotated.resize(size);
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      const int64_t from = (index * p.kv_heads + head) * size, to = position * p.kv_heads + head;
      const float* key = tokens.k + from;
      if (p.angles != nullptr) {
        rotate(key, p.angles + index * size, size, rotated.data());
        key = rotated.data();
      }
      store(p.type, key, size, cache.k, to, cache.k_scale);
      store(p.type, tokens.v + from, size, cache.v, to, cache.v_scale);
    }
  };
  const int64_t count = p.batch * p.tokens;
  if (count * p.kv_heads * p.head_size < kSerialElements) {
    for (int64_t index = 0; index < count; ++index) token(index);
  } else {
    parallel_for(count, token);
  }
}

}  // namespace bitnet
