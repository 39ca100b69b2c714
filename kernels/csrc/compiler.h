// Compiler-specific attributes and pragmas.

#ifndef BITNET_KERNELS_COMPILER_H_
#define BITNET_KERNELS_COMPILER_H_

// The library is compiled with -fvisibility=hidden: only what ctypes and XLA look up by name is exported.
#define BITNET_EXPORT __attribute__((visibility("default")))

// Before a loop over accumulators: they stay in registers only where the loop is fully unrolled.
#if defined(__clang__)
#define BITNET_UNROLL _Pragma("clang loop unroll(full)")
#else
#define BITNET_UNROLL _Pragma("GCC unroll 16")
#endif

#endif  // BITNET_KERNELS_COMPILER_H_
