// The gradient of softmax attention, on raw pointers: what training needs besides the forward pass of attention.h.
//
// Scores are computed again, so nothing of size tokens x keys is kept between the passes or held in memory at once: a
// block of queries has the scores of all keys, in cache. With s the scale, P = softmax(s q.k) over the visible keys:
//
//   dP = dout.v,   dS = s P (dP - sum_j P dP),   dq = dS k,   dk = dS^T q,   dv = P^T dout
//
// The heads that share keys and values are computed by one thread in a fixed order, so the bits do not depend on threads.

#ifndef BITNET_KERNELS_ATTENTION_GRADIENT_H_
#define BITNET_KERNELS_ATTENTION_GRADIENT_H_

#include <cstdint>

#include "float_matmul.h"

namespace bitnet {

struct AttentionGradient {
  int64_t batch, tokens, heads, keys, kv_heads, head_size;
  float scale;
  const float* q;          // [batch, tokens, heads, head_size]
  const float* k;          // [batch, keys, kv_heads, head_size]
  const float* v;          // the same
  const uint8_t* visible;  // [batch, tokens, keys], 0 or 1
  const float* dout;       // as q
  float* dq;
  float* dk;
  float* dv;
};

// The loops over a row, of one instruction family (attention_gradient_loops.h). width is a multiple of 16.
struct AttentionGradientKernels {
  // Scores x[width] of which [begin, end) count, hidden where visible (null: nowhere) is 0 -> their softmax, 0 elsewhere.
  void (*softmax)(float* x, int64_t width, int64_t begin, int64_t end, const uint8_t* visible, float scale);
  // dp[width] -> scale p (dp - sum p dp).
  void (*gradient)(const float* p, float* dp, int64_t width, float scale);
};

// Writes dq, dk and dv, on all threads.
void attention_gradient(const AttentionGradientKernels& rows, const FloatMatmulKernels& products,
                        const AttentionGradient& p);

}  // namespace bitnet

#endif  // BITNET_KERNELS_ATTENTION_GRADIENT_H_
