// The rounding mode of a thread. XLA's threads flush denormal numbers to zero and other threads do not, so a helper
// that computes for a caller takes over its mode, or sets the one it needs.

#ifndef BITNET_KERNELS_FLOAT_MODE_H_
#define BITNET_KERNELS_FLOAT_MODE_H_

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace bitnet {

// A mode until the end of the scope.
class FloatMode {
 public:
#if defined(__x86_64__)
  static constexpr uint64_t kIeee = 0x1f80;  // to nearest, denormal numbers kept, every exception masked
  static uint64_t current() { return _mm_getcsr(); }
#elif defined(__aarch64__)
  static constexpr uint64_t kIeee = 0;
  static uint64_t current() {
    uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
#else
  static constexpr uint64_t kIeee = 0;
  static uint64_t current() { return 0; }
#endif

  explicit FloatMode(uint64_t mode) : saved_(current()) { set(mode); }
  ~FloatMode() { set(saved_); }
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

 private:
#if defined(__x86_64__)
  static void set(uint64_t mode) { _mm_setcsr(static_cast<uint32_t>(mode)); }
#elif defined(__aarch64__)
  static void set(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
#else
  static void set(uint64_t) {}
#endif
  const uint64_t saved_;
};

}  // namespace bitnet

#endif  // BITNET_KERNELS_FLOAT_MODE_H_
