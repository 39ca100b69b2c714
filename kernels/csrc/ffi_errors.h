// Errors of custom calls: arguments that do not fit, and exceptions.

#ifndef BITNET_KERNELS_FFI_ERRORS_H_
#define BITNET_KERNELS_FFI_ERRORS_H_

#include <cstdio>
#include <exception>
#include <new>
#include <string>
#include <string_view>
#include <utility>

#include "kernels.h"
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

// Runs a handler; an exception becomes an error of the call, because one that reaches XLA ends the process. Building
// the error must not throw either, so its message is a plain character array.
inline XLA_FFI_Error* guarded(XLA_FFI_Handler* handler, XLA_FFI_CallFrame* frame) noexcept {
  char message[256] = "bitnet_kernels: out of memory";
  XLA_FFI_Error_Create_Args args = {};
  args.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
  args.message = message;
  args.errc = XLA_FFI_Error_Code_INTERNAL;
  try {
    return handler(frame);
  } catch (const std::bad_alloc&) {
    args.errc = XLA_FFI_Error_Code_RESOURCE_EXHAUSTED;
  } catch (const std::exception& error) {
    std::snprintf(message, sizeof(message), "bitnet_kernels: %s", error.what());
  } catch (...) {
    std::snprintf(message, sizeof(message), "bitnet_kernels: unknown exception");
  }
  return frame->api->XLA_FFI_Error_Create(&args);
}

}  // namespace bitnet

// Defines the exported symbol of a custom call. Like XLA_FFI_DEFINE_HANDLER_SYMBOL, with everything guarded: the call,
// the decoding of its arguments, and the construction of the handler.
#define BITNET_FFI_HANDLER(name, call, ...)                                                 \
  static XLA_FFI_Error* name##_unguarded(XLA_FFI_CallFrame* frame) {                         \
    static auto* handler = (__VA_ARGS__).To(call).release();                                 \
    return handler->Call(frame);                                                             \
  }                                                                                          \
  extern "C" BITNET_EXPORT XLA_FFI_Error* name(XLA_FFI_CallFrame* frame) noexcept;           \
  extern "C" XLA_FFI_Error* name(XLA_FFI_CallFrame* frame) noexcept {                        \
    return bitnet::guarded(name##_unguarded, frame);                                         \
  }

#endif  // BITNET_KERNELS_FFI_ERRORS_H_
