// The largest logits of a bfloat16 head, exactly, from integer products with an int8 copy of its table.
//
// An int8 copy w = s c of a row t and two int8 digits of x, x ~ x' = step (high + low / 254), give in exact integers
//
//   a = w . x' = s step (254 high . c + low . c) / 254
//
// and the logit y that head.h defines for the row is at most
//
//   |y - a| <= |fl(t . x) - t . x| + |(t - w) . x| + |w . (x - x')|
//           <= g |t| |x| + tiny    + |t - w| |x|   + |w| |x - x'|          (Cauchy-Schwarz; |.| are Euclidean norms)
//
// away from it. n = ceil(k / 16) + 4 roundings reach a product, of 2^-24 each: g = n 2^-24 / (1 - n 2^-24) (Higham,
// Accuracy and Stability of Numerical Algorithms, 2002, lemma 3.1); sums below the normal numbers lose 2^-150 each:
// tiny = (k + 32) 2^-149. |t| <= |w| + |t - w|. The norms of w and t - w come with the table, rounded up
// (bitnet_kernels/head.py); those of x and x - x' are computed here in double, whose own roundings, below 1e-12 |x|
// for k up to 2^16, are added. Where a sum of absolute products could pass 2^127, or is not a number, nothing is
// bounded and the row counts as possible.
//
// The k-th largest of the lower ends a - e is at most the k-th largest logit. So a row whose upper end a + e lies
// below it is strictly below the k largest logits, and all other rows, the candidates, get their logit from head_rows.

#ifndef BITNET_KERNELS_HEAD_EXACT_H_
#define BITNET_KERNELS_HEAD_EXACT_H_

#include <cstdint>

#include "head.h"

namespace bitnet {

constexpr int64_t kMaxExactInputs = int64_t{1} << 16;  // int32 sums of int8 products, and the roundings above

struct ExactProblem {
  HeadProblem head;
  const int8_t* digits;  // [2, m, k]: high, low
  const float* x_scale;  // [m]: step
  const int32_t* sums;   // [2, m, n]: digits times codes
  const float* w_scale;  // [n]: s
  const float* norms;    // [2, n]: at least |t - w|, at least |w|
  int64_t top;           // how many logits must be among the candidates
};

// Writes head.y: the logits of the candidates, -infinity elsewhere; and their number for every row of x, [m].
// Sets its own mode, FloatMode::kIeee.
void exact_top_logits(const ExactProblem& p, HeadRows head_rows, int32_t* candidates);

}  // namespace bitnet

#endif  // BITNET_KERNELS_HEAD_EXACT_H_
