// Binary weights times activations that are signs too: bits that differ, counted.
//
// With x as bits in the order of the weights, sum(w x) = inputs - 2 popcount(w xor x). A 32-bit lane of a binary block
// holds 32 inputs of one row, so one word of x meets 16 rows at once. Padding is 0 on both sides and never differs.

#ifndef BITNET_KERNELS_SIGN_MATMUL_H_
#define BITNET_KERNELS_SIGN_MATMUL_H_

#include <cstdint>
#include <string_view>

#include "integer_matmul.h"

namespace bitnet {

// Kernels whose problem has, in place of int8 activations, words of 32 signs: x_stride is 4 bytes a block, and x_sums
// hold the number of inputs of a group, the largest sum there can be. nullptr for an instruction set that is absent.
const Kernels* find_sign_kernels(std::string_view isa);

// The words of one group of signs: bit 8 j + s of word b is set where x[32 b + 4 s + j] > 0. Writes ceil(count / 32).
void pack_signs(const int8_t* x, int64_t count, uint32_t* words);

}  // namespace bitnet

#endif  // BITNET_KERNELS_SIGN_MATMUL_H_
