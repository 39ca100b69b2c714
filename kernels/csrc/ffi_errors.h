// What every custom call answers to arguments that do not fit.

#ifndef BITNET_KERNELS_FFI_ERRORS_H_
#define BITNET_KERNELS_FFI_ERRORS_H_

#include <string>
#include <string_view>
#include <utility>

#include "isa.h"
#include "xla/ffi/api/ffi.h"

namespace bitnet {

inline xla::ffi::Error invalid(std::string message) {
  return xla::ffi::Error::InvalidArgument("bitnet_kernels: " + std::move(message));
}

inline xla::ffi::Error unknown_isa(std::string_view isa) {
  return invalid("isa=" + std::string(isa) + " is not available; expected one of " + bitnet_kernels_available_isas());
}

inline std::string dims(xla::ffi::AnyBuffer::Dimensions dimensions) {
  std::string text = "[";
  for (int64_t dim : dimensions) text += (text.size() > 1 ? ", " : "") + std::to_string(dim);
  return text + "]";
}

}  // namespace bitnet

#endif  // BITNET_KERNELS_FFI_ERRORS_H_
