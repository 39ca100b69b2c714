// The CPU features that the kernels need.

#ifndef BITNET_KERNELS_PROCESSOR_H_
#define BITNET_KERNELS_PROCESSOR_H_

#include <cstdint>

namespace bitnet {

// A feature is set where the processor has it and the operating system saves its registers.
struct Processor {
  // x86-64
  bool avx2 = false;
  bool fma = false;              // besides AVX2
  bool f16c = false;             // besides AVX2
  bool avxvnni = false;          // besides AVX2
  bool avx512vnni = false;       // with AVX-512 F, BW and VL
  bool avx512vbmi = false;       // besides avx512vnni
  bool avx512vpopcntdq = false;  // besides avx512vnni
  bool amx_int8 = false;         // besides avx512vbmi; the operating system has granted the tile registers
  bool fast_shuffles = false;    // 512-bit shuffles are as fast as 512-bit multiplications
  // aarch64
  bool dotprod = false;
  bool i8mm = false;  // besides dotprod
};

// How many bytes ahead of a loop over memory to prefetch. Chosen by trials with four streams on Intel Sapphire Rapids (1
// KiB slightly slower, 4 KiB much) and AMD Zen 4.
int64_t prefetch_distance();

// Queries the processor; takes microseconds in a virtual machine, so call it once.
Processor detect_processor();

}  // namespace bitnet

#endif  // BITNET_KERNELS_PROCESSOR_H_
