#include "processor.h"

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace bitnet {

#if defined(__x86_64__)

namespace {

bool has(uint32_t value, uint32_t bits) { return (value & bits) == bits; }

// The register states that the operating system saves: the low half of XCR0, or 0 where it cannot be read.
uint32_t saved_states(uint32_t leaf1_ecx) {
  if (!has(leaf1_ecx, 1u << 27)) return 0;  // OSXSAVE
  uint32_t eax, edx;
  asm("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return eax;
}

// Linux saves AMX tiles only for a process that requests them; the permission covers all of its threads.
bool request_amx_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

// Uses cpuid itself: __builtin_cpu_supports returns false for everything in some clang distributions.
Processor detect_processor() {
  Processor cpu;
  uint32_t eax, ebx, ecx, edx, vendor;
  if (!__get_cpuid(0, &eax, &vendor, &ecx, &edx) || !__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return cpu;
  const uint32_t saved = saved_states(ecx);
  const bool fma = has(ecx, 1u << 12), f16c = has(ecx, 1u << 29);
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return cpu;
  cpu.avx2 = has(saved, 0x06) && has(ebx, 1u << 5);
  cpu.fma = cpu.avx2 && fma;
  cpu.f16c = cpu.avx2 && f16c;
  const bool avx512 = has(saved, 0xe6) && has(ebx, 1u << 16 | 1u << 30 | 1u << 31);  // F, BW, VL
  cpu.avx512vnni = avx512 && has(ecx, 1u << 11);
  cpu.avx512vbmi = cpu.avx512vnni && has(ecx, 1u << 1);
  cpu.avx512vpopcntdq = cpu.avx512vnni && has(ecx, 1u << 14);
  const bool amx = has(edx, 1u << 24 | 1u << 25) && has(saved, 3u << 17);  // tile, int8
  cpu.amx_int8 = cpu.avx512vbmi && amx && request_amx_tiles();
  cpu.avxvnni = cpu.avx2 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && has(eax, 1u << 4);
  cpu.fast_shuffles = vendor == signature_AMD_ebx;  // all AMD processors with AVX-512 so far
  return cpu;
}

#elif defined(__aarch64__) && defined(__linux__)

Processor detect_processor() {
  constexpr unsigned long kDotProd = 1ul << 20, kI8mm = 1ul << 13;  // HWCAP_ASIMDDP, HWCAP2_I8MM
  Processor cpu;
  cpu.dotprod = getauxval(AT_HWCAP) & kDotProd;
  cpu.i8mm = cpu.dotprod && (getauxval(AT_HWCAP2) & kI8mm);
  return cpu;
}

#elif defined(__aarch64__) && defined(__APPLE__)

namespace {

bool feature(const char* name) {
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}

}  // namespace

Processor detect_processor() {
  Processor cpu;
  cpu.dotprod = feature("hw.optional.arm.FEAT_DotProd");
  cpu.i8mm = cpu.dotprod && feature("hw.optional.arm.FEAT_I8MM");
  return cpu;
}

#else

Processor detect_processor() { return {}; }

#endif

int64_t prefetch_distance() {
  static const bool amd = detect_processor().fast_shuffles;
  return amd ? 1 << 10 : 2 << 10;
}

}  // namespace bitnet
