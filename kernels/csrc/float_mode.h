// Floating point as IEEE 754 defines it, whoever the calling thread belongs to: rounding to nearest, denormal numbers
// kept. XLA's threads flush them to zero and other threads do not.

#ifndef BITNET_KERNELS_FLOAT_MODE_H_
#define BITNET_KERNELS_FLOAT_MODE_H_

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace bitnet {

class IeeeMode {
 public:
  IeeeMode() : saved_(get()) { set(kIeee); }
  ~IeeeMode() { set(saved_); }
  IeeeMode(const IeeeMode&) = delete;
  IeeeMode& operator=(const IeeeMode&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr uint64_t kIeee = 0x1f80;  // every exception masked
  static uint64_t get() { return _mm_getcsr(); }
  static void set(uint64_t mode) { _mm_setcsr(static_cast<uint32_t>(mode)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kIeee = 0;
  static uint64_t get() {
    uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
#else
  static constexpr uint64_t kIeee = 0;
  static uint64_t get() { return 0; }
  static void set(uint64_t) {}
#endif
  const uint64_t saved_;
};

}  // namespace bitnet

#endif  // BITNET_KERNELS_FLOAT_MODE_H_
