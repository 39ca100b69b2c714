// New keys and values on their way into a cache: rotated, converted to its format, written behind what is there.

#ifndef BITNET_KERNELS_KV_CACHE_H_
#define BITNET_KERNELS_KV_CACHE_H_

#include <cstdint>

#include "attention.h"

namespace bitnet {

// Rotates the channel pairs (i, i + size / 2) of a head. angles: size / 2 cosines, then as many sines.
inline void rotate(const float* x, const float* angles, int64_t size, float* to) {
  const int64_t half = size / 2;
  const float *cosine = angles, *sine = angles + half;
  for (int64_t i = 0; i < half; ++i) to[i] = x[i] * cosine[i] - x[half + i] * sine[i];
  for (int64_t i = 0; i < half; ++i) to[half + i] = x[half + i] * cosine[i] + x[i] * sine[i];
}

struct NewTokens {
  const float* k;        // [batch, tokens, kv_heads, head_size]
  const float* v;        // the same
  const int32_t* start;  // [batch], the position of the first new token of a sequence
};

// The cache of a problem, writable.
struct CacheArrays {
  void* k;
  void* v;
  float* k_scale;
  float* v_scale;
};

// The position of the first new token of a sequence, moved so that all of them fit, as in dynamic_update_slice.
int64_t first_position(const AttentionProblem& p, const NewTokens& tokens, int64_t sequence);

// Writes the new tokens, keys rotated by p.angles where there are some, on all threads.
void append(const AttentionProblem& p, const NewTokens& tokens, const CacheArrays& cache);

}  // namespace bitnet

#endif  // BITNET_KERNELS_KV_CACHE_H_
