// The speed limit of the multipliers: loops that only multiply registers, for the benchmark to divide by.

#include <atomic>
#include <cstdint>

#include "kernels.h"
#include "threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bitnet {
namespace {

#if defined(__x86_64__)

// Twelve products that do not wait for each other, on registers 4 to 15.
#define BITNET_TWELVE(line) \
  line("4") line("5") line("6") line("7") line("8") line("9") line("10") line("11") line("12") line("13") line("14") \
      line("15")
#define BITNET_CLOBBERED                                                                                            \
  "xmm0", "xmm1", "xmm2", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", \
      "xmm15"
#define BITNET_ZMM_DOT(sum) "vpdpbusd %%zmm1, %%zmm0, %%zmm" sum "\n\t"
#define BITNET_YMM_DOT(sum) "%{vex%} vpdpbusd %%ymm1, %%ymm0, %%ymm" sum "\n\t"
#define BITNET_YMM_MADD(sum) \
  "vpmaddubsw %%ymm1, %%ymm0, %%ymm2\n\tvpaddw %%ymm2, %%ymm" sum ", %%ymm" sum "\n\t"

#define BITNET_YMM_FMA(sum) "vfmadd231ps %%ymm1, %%ymm0, %%ymm" sum "\n\t"
#define BITNET_ZMM_FMA(sum) "vfmadd231ps %%zmm1, %%zmm0, %%zmm" sum "\n\t"
#define BITNET_ZERO(sum) "vxorps %%xmm" sum ", %%xmm" sum ", %%xmm" sum "\n\t"

#define BITNET_REPEAT(times, line)                                                                   \
  for (int64_t i = 0; i < times; ++i) asm volatile(BITNET_TWELVE(line) : : : BITNET_CLOBBERED);      \
  asm volatile("vzeroupper" : : : BITNET_CLOBBERED)

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

__attribute__((target("amx-tile,amx-int8"))) void repeat_tiles(int64_t times) {
  const TileShapes shapes;
  asm volatile("" : : "r"(&shapes) : "memory");  // gcc does not know that the shapes are read
  _tile_loadconfig(&shapes);
  for (int64_t i = 0; i < times; ++i) {
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_release();
}

}  // namespace

int64_t dot_peak_avx2(int64_t times);
int64_t dot_peak_avxvnni(int64_t times);
int64_t dot_peak_avx512vnni(int64_t times);
int64_t dot_peak_amx(int64_t times);
int64_t float_peak_avx2(int64_t times);
int64_t float_peak_avx512(int64_t times);

int64_t dot_peak_avx2(int64_t times) {
  BITNET_REPEAT(times, BITNET_YMM_MADD);
  return 12 * 32 * times;
}
int64_t dot_peak_avxvnni(int64_t times) {
  BITNET_REPEAT(times, BITNET_YMM_DOT);
  return 12 * 32 * times;
}
int64_t dot_peak_avx512vnni(int64_t times) {
  BITNET_REPEAT(times, BITNET_ZMM_DOT);
  return 12 * 64 * times;
}
int64_t dot_peak_amx(int64_t times) {
  repeat_tiles(times);
  return 4 * 16 * 16 * 64 * times;
}

// Of zeros: denormal numbers that happen to be in the registers would be slow.
int64_t float_peak_avx2(int64_t times) {
  asm volatile(BITNET_TWELVE(BITNET_ZERO) BITNET_ZERO("0") BITNET_ZERO("1") : : : BITNET_CLOBBERED);
  BITNET_REPEAT(times, BITNET_YMM_FMA);
  return 12 * 8 * times;
}
int64_t float_peak_avx512(int64_t times) {
  asm volatile(BITNET_TWELVE(BITNET_ZERO) BITNET_ZERO("0") BITNET_ZERO("1") : : : BITNET_CLOBBERED);
  BITNET_REPEAT(times, BITNET_ZMM_FMA);
  return 12 * 16 * times;
}

#else
}  // namespace
#endif  // __x86_64__

}  // namespace bitnet

namespace {

int64_t on_all_threads(bitnet::Peak peak, int64_t times) {
  if (peak == nullptr) return 0;
  std::atomic<int64_t> products{0};
  bitnet::parallel_for(bitnet::thread_count(), [&](int64_t) { products += peak(times); });
  return products;
}

}  // namespace

// Multiplies int8, or float32, in registers as the kernels of an instruction set do, for `times` rounds on every thread,
// and returns the number of products; 0 where the processor lacks the set or there is no such loop for it (scalar).
extern "C" BITNET_EXPORT int64_t bitnet_kernels_dot_peak(const char* isa, int64_t times) noexcept {
  const bitnet::Kernels* kernels = bitnet::find_kernels(isa);
  return kernels == nullptr ? 0 : on_all_threads(kernels->dot_peak, times);
}
extern "C" BITNET_EXPORT int64_t bitnet_kernels_float_peak(const char* isa, int64_t times) noexcept {
  const bitnet::Kernels* kernels = bitnet::find_kernels(isa);
  return kernels == nullptr ? 0 : on_all_threads(kernels->floats->peak, times);
}
