// Integer division rounded up, of numbers that are not negative.

#ifndef BITNET_KERNELS_DIVIDE_H_
#define BITNET_KERNELS_DIVIDE_H_

#include <cstdint>

namespace bitnet {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

}  // namespace bitnet

#endif  // BITNET_KERNELS_DIVIDE_H_
