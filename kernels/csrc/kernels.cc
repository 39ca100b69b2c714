#include "kernels.h"

#include <array>
#include <cstring>
#include <type_traits>

#include "processor.h"

namespace bitnet {

// Defined in integer_matmul_<name>.cc, sign_matmul.cc, float_kernels_<family>.cc and dot_peak.cc.
extern const MatmulKernels kScalarInteger, kScalarSign;
extern const FloatKernels kScalarFloats;
#if defined(__x86_64__)
extern const MatmulKernels kAvx2Integer, kAvxVnniInteger, kAvx512VnniInteger, kAvx512VbmiInteger, kAvx512LookupInteger,
    kAmxInteger;
extern const MatmulKernels kAvx2Sign, kAvx512Sign;
extern const FloatKernels kAvx2Floats, kAvx512Floats;
int64_t dot_peak_avx2(int64_t times);
int64_t dot_peak_avxvnni(int64_t times);
int64_t dot_peak_avx512vnni(int64_t times);
int64_t dot_peak_amx(int64_t times);
#elif defined(__aarch64__)
extern const MatmulKernels kNeonInteger, kI8mmInteger;
extern const FloatKernels kNeonFloats;
#endif

namespace {

// The table, slowest instruction set first: the last available row is the default.
auto make_table([[maybe_unused]] const Processor& cpu) {
  const Kernels scalar = {"scalar", true, &kScalarInteger, &kScalarSign, &kScalarFloats, nullptr, widen_scalar};
#if defined(__x86_64__)
  // What an instruction set name does not promise: FMA and F16C with AVX2, vpopcntd with AVX-512.
  const FloatKernels* floats256 = cpu.fma ? &kAvx2Floats : &kScalarFloats;
  const MatmulKernels* sign512 = cpu.avx512vpopcntdq ? &kAvx512Sign : &kAvx2Sign;
  const Widen widen = cpu.f16c ? widen_f16c : widen_scalar;
  const Peak peak512 = dot_peak_avx512vnni;
  const Kernels avx2 = {"avx2", cpu.avx2, &kAvx2Integer, &kAvx2Sign, floats256, dot_peak_avx2, widen};
  const Kernels avxvnni = {"avxvnni", cpu.avxvnni, &kAvxVnniInteger, &kAvx2Sign, floats256, dot_peak_avxvnni, widen};
  const Kernels vnni = {"avx512vnni", cpu.avx512vnni, &kAvx512VnniInteger, sign512, &kAvx512Floats, peak512, widen};
  const Kernels vbmi = {"avx512vbmi", cpu.avx512vbmi, &kAvx512VbmiInteger, sign512, &kAvx512Floats, peak512, widen};
  const Kernels lookup = {"avx512lookup", cpu.avx512vbmi, &kAvx512LookupInteger, sign512, &kAvx512Floats, peak512, widen};
  const Kernels amx = {"amx", cpu.amx_int8, &kAmxInteger, sign512, &kAvx512Floats, dot_peak_amx, widen};
  return std::array{scalar, avx2, avxvnni, vnni, cpu.fast_shuffles ? vbmi : lookup, cpu.fast_shuffles ? lookup : vbmi,
                    amx};
#elif defined(__aarch64__)
  const Kernels neon = {"neon", cpu.dotprod, &kNeonInteger, &kScalarSign, &kNeonFloats, nullptr, widen_neon};
  const Kernels i8mm = {"i8mm", cpu.i8mm, &kI8mmInteger, &kScalarSign, &kNeonFloats, nullptr, widen_neon};
  return std::array{scalar, neon, i8mm};
#else
  return std::array{scalar};
#endif
}

const auto& table() {
  static const auto rows = make_table(detect_processor());
  return rows;
}

// Names joined by commas, in a fixed array.
struct Names {
  char text[256] = {};

  void add(const char* name) {
    const size_t length = std::strlen(text);
    if (length + std::strlen(name) + 2 > sizeof(text)) return;
    if (length > 0) std::strcat(text, ",");
    std::strcat(text, name);
  }
};

Names join(bool only_available) {
  Names names;
  for (const Kernels& row : table()) {
    if (row.available || !only_available) names.add(row.isa);
  }
  return names;
}

// Nothing here is destroyed at the end of the process, when other threads may still be in the middle of a call.
static_assert(std::is_trivially_destructible_v<std::remove_reference_t<decltype(table())>>);
static_assert(std::is_trivially_destructible_v<Names>);

}  // namespace

const Kernels* find_kernels(std::string_view isa) {
  for (const Kernels& row : table()) {
    if (row.available && isa == row.isa) return &row;
  }
  return nullptr;
}

}  // namespace bitnet

extern "C" const char* bitnet_kernels_available_isas() noexcept {
  static const bitnet::Names names = bitnet::join(true);
  return names.text;
}

extern "C" const char* bitnet_kernels_known_isas() noexcept {
  static const bitnet::Names names = bitnet::join(false);
  return names.text;
}
