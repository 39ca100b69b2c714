#include "isa.h"

#include <string>
#include <vector>

namespace bitnet {
namespace {

std::vector<const Kernels*> detect() {
  std::vector<const Kernels*> available = {&kScalarKernels};
#if defined(__x86_64__)
  __builtin_cpu_init();  // these also ask whether the operating system saves the registers
  if (__builtin_cpu_supports("avx2")) available.push_back(&kAvx2Kernels);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
    available.push_back(&kAvx512VnniKernels);
  }
#endif
  return available;
}

const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> kernels = detect();
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
  static const std::string names = [] {
    std::string joined;
    for (const bitnet::Kernels* kernels : bitnet::available()) {
      if (!joined.empty()) joined += ",";
      joined += kernels->isa;
    }
    return joined;
  }();
  return names.c_str();
}
