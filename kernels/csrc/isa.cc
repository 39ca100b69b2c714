#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include <cstdint>
#include <string>
#include <vector>

namespace bitnet {
namespace {

#if defined(__x86_64__)

bool has(uint32_t value, uint32_t bits) { return (value & bits) == bits; }

// The registers that the operating system saves: the low half of XCR0, or 0 where it cannot be read.
uint32_t saved_registers() {
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !has(ecx, 1u << 27)) return 0;  // OSXSAVE
  asm("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return eax;
}

// Linux saves the tiles of AMX for processes that ask for it; the answer holds for all their threads.
bool tiles_are_permitted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Whether 512 bits are shuffled as fast as multiplied: so far by AMD's processors, all that have AVX-512.
bool looks_up_fast() {
  uint32_t eax, ebx, ecx, edx;
  return __get_cpuid(0, &eax, &ebx, &ecx, &edx) && ebx == signature_AMD_ebx;
}

// By cpuid itself: __builtin_cpu_supports answers no to everything in some clang distributions.
void detect_x86(std::vector<const Kernels*>& available) {
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return;
  const uint32_t saved = saved_registers();
  const bool avx2 = has(saved, 0x06) && has(ebx, 1u << 5);
  const bool avx512 = has(saved, 0xe6) && has(ebx, 1u << 16 | 1u << 30 | 1u << 31);  // F, BW, VL
  const bool avx512vnni = avx512 && has(ecx, 1u << 11), avx512vbmi = avx512vnni && has(ecx, 1u << 1);
  const uint32_t features = edx;
  const bool avxvnni = avx2 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && has(eax, 1u << 4);
  const bool amx = avx512vbmi && has(features, 1u << 24 | 1u << 25) && has(saved, 3u << 17) && tiles_are_permitted();
  if (avx2) available.push_back(&kAvx2Kernels);
  if (avxvnni) available.push_back(&kAvxVnniKernels);
  if (avx512vnni) available.push_back(&kAvx512VnniKernels);
  if (avx512vbmi && !looks_up_fast()) available.push_back(&kAvx512LookupKernels);
  if (avx512vbmi) available.push_back(&kAvx512VbmiKernels);
  if (avx512vbmi && looks_up_fast()) available.push_back(&kAvx512LookupKernels);
  if (amx) available.push_back(&kAmxKernels);
}

#elif defined(__aarch64__) && defined(__linux__)

void detect_aarch64(std::vector<const Kernels*>& available) {
  constexpr unsigned long kDotProducts = 1ul << 20, kI8mm = 1ul << 13;  // HWCAP_ASIMDDP, HWCAP2_I8MM
  if (!(getauxval(AT_HWCAP) & kDotProducts)) return;
  available.push_back(&kNeonKernels);
  if (getauxval(AT_HWCAP2) & kI8mm) available.push_back(&kI8mmKernels);
}

#endif

std::vector<const Kernels*> detect() {
  std::vector<const Kernels*> available = {&kScalarKernels};
#if defined(__x86_64__)
  detect_x86(available);
#elif defined(__aarch64__) && defined(__linux__)
  detect_aarch64(available);
#endif
  return available;
}

// Never destroyed, like the names below: at the end of the process other threads may be in the middle of a call.
const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*>& kernels = *new std::vector<const Kernels*>(detect());
  return kernels;
}

}  // namespace

const Kernels* find_kernels(std::string_view isa) {
  for (const Kernels* kernels : available()) {
    if (isa == kernels->isa) return kernels;
  }
  return nullptr;
}

}  // namespace bitnet

extern "C" const char* bitnet_kernels_available_isas() {
  static const std::string& names = *[] {
    std::string joined;
    for (const bitnet::Kernels* kernels : bitnet::available()) {
      if (!joined.empty()) joined += ",";
      joined += kernels->isa;
    }
    return new std::string(joined);
  }();
  return names.c_str();
}
