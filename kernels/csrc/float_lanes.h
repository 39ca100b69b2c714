// The operations on a vector of 16 float32 that attention_loops.h and head_loops.h are written in. Included by
// float_lanes_<family>.h, which first defines BITNET_TARGET, the attribute that lets a function use the family.
//
// A Lanes struct has a type Vec and, on it:
//
//   load, store, set1, add, sub, mul
//   fma(a, b, c)                a b + c, rounded once
//   max(a, b)                   a > b ? a : b
//   select_less(a, b, x, y)     a < b ? x : y
//   load_bfloat16, load_int8    widened to float32
//   add_to_exponent(y, t)       bits of y + (bits of t << 23)
//   first, sum_of, max_of       lane 0; over all lanes: j with j + 8, then with j + 4, j + 2, j + 1
//   transpose(x)                four vectors as a 4 x 4 matrix of quarters
//
// A Vec is kParts Parts, for tiles that would not fit into registers as Vecs: load_part, store_part, set1_part,
// fma_part, repeat4 (four floats repeated) and sum4 (of quarters: AttentionLoops::Score).

#ifndef BITNET_KERNELS_FLOAT_LANES_H_
#define BITNET_KERNELS_FLOAT_LANES_H_

#include <cstdint>

#include "compiler.h"

#ifndef BITNET_TARGET
#error "include float_lanes_<family>.h"
#endif
#define BITNET_INLINE BITNET_TARGET inline __attribute__((always_inline))

namespace bitnet {

constexpr int64_t kLanes = 16;

}  // namespace bitnet

#endif  // BITNET_KERNELS_FLOAT_LANES_H_
