#include "head.h"

namespace bitnet {

HeadRows find_head_rows(std::string_view isa) {
  if (isa == "scalar") return head_rows_scalar();
#if defined(__x86_64__)
  // The extensions that set the integer kernels apart do not matter to floats.
  if (isa.substr(0, 6) == "avx512" || isa == "amx") return head_rows_avx512();
  if (isa == "avx2" || isa == "avxvnni") return head_rows_avx2();
#elif defined(__aarch64__)
  if (isa == "neon" || isa == "i8mm") return head_rows_neon();
#endif
  return nullptr;
}

}  // namespace bitnet
