// What every custom call answers to arguments that do not fit, and to what goes wrong inside it.

#ifndef BITNET_KERNELS_FFI_ERRORS_H_
#define BITNET_KERNELS_FFI_ERRORS_H_

#include <exception>
#include <new>
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

// A custom call that answers with an error where it would throw: an exception that reaches XLA ends the process.
template <auto kCall>
struct Guarded;

template <typename... Arguments, xla::ffi::Error (*kCall)(Arguments...)>
struct Guarded<kCall> {
  static xla::ffi::Error call(Arguments... arguments) {
    try {
      return kCall(std::move(arguments)...);
    } catch (const std::bad_alloc&) {
      return {xla::ffi::ErrorCode::kResourceExhausted, "bitnet_kernels: out of memory"};
    } catch (const std::exception& error) {
      return xla::ffi::Error::Internal(std::string("bitnet_kernels: ") + error.what());
    }
  }
};

template <auto kCall>
constexpr auto guarded = &Guarded<kCall>::call;

}  // namespace bitnet

#endif  // BITNET_KERNELS_FFI_ERRORS_H_
