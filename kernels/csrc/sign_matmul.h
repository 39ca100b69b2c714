// Binary weights times activations that are signs too: bits that differ, counted.
//
// With x as bits in the order of the weights, sum(w x) = inputs - 2 popcount(w xor x). A 32-bit lane of a binary block
// holds 32 inputs of one row, so one word of x meets 16 rows at once. Padding is 0 on both sides and never differs.

#ifndef BITNET_KERNELS_SIGN_MATMUL_H_
#define BITNET_KERNELS_SIGN_MATMUL_H_

#include <cstdint>

namespace bitnet {

// The sign kernels of the table (kernels.h) take a Problem with words of 32 signs in place of int8 activations:
// x_stride is 4 bytes a block, and x_sums is the number of inputs of a group, the largest possible sum.

// The words of one group of signs: bit 8 j + s of word b is set where x[32 b + 4 s + j] > 0. Writes ceil(count / 32).
void pack_signs(const int8_t* x, int64_t count, uint32_t* words);

}  // namespace bitnet

#endif  // BITNET_KERNELS_SIGN_MATMUL_H_
