// XLA custom call: products of float32 matrices in any layout, for training.

#include <cstdint>
#include <string>
#include <string_view>

#include "ffi_errors.h"
#include "float_matmul.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace bitnet {
namespace {

using Floats = ffi::Buffer<ffi::F32, 2>;

struct Size {
  int64_t rows, k;
};

// An operand [rows, k], or [k, rows] if transposed.
Size size_of(ffi::AnyBuffer::Dimensions size, bool transposed) {
  return transposed ? Size{size[1], size[0]} : Size{size[0], size[1]};
}

template <typename T>
Operand<T> operand(const T* data, Size size, bool transposed) {
  return transposed ? Operand<T>{data, 1, size.rows} : Operand<T>{data, size.k, 1};
}

ffi::Error float_matmul_call(Floats a, ffi::AnyBuffer b, bool transposed_a, bool transposed_b, std::string_view isa,
                             ffi::Result<Floats> c) {
  if (b.dimensions().size() != 2 || (b.element_type() != ffi::F32 && b.element_type() != ffi::S8)) {
    return invalid("expected b as float32 or int8 [n, k]; got rank " + std::to_string(b.dimensions().size()));
  }
  const Size of_a = size_of(a.dimensions(), transposed_a), of_b = size_of(b.dimensions(), transposed_b);
  if (of_a.k != of_b.k || c->dimensions()[0] != of_a.rows || c->dimensions()[1] != of_b.rows) {
    return invalid("expected a[m, k], b[n, k] and c[m, n], or a and b transposed; got a" + dims(a.dimensions()) + ", b" +
                   dims(b.dimensions()) + ", c" + dims(c->dimensions()));
  }
  const Kernels* kernels = find_kernels(isa);
  if (kernels == nullptr) return unknown_isa(isa);
  FloatMatmul p = {of_a.rows, of_b.rows, of_a.k, operand(a.typed_data(), of_a, transposed_a), {}, c->typed_data()};
  if (b.element_type() == ffi::S8) {
    p.b.codes = operand(b.typed_data<int8_t>(), of_b, transposed_b);
  } else {
    p.b.floats = operand(b.typed_data<float>(), of_b, transposed_b);
  }
  float_matmul(kernels->floats->matmul, p);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace bitnet

BITNET_FFI_HANDLER(bitnet_kernels_float_matmul, bitnet::float_matmul_call,
                   ffi::Ffi::Bind()
                       .Arg<bitnet::Floats>()  // a [m, k], or [k, m] if transposed
                       .Arg<ffi::AnyBuffer>()  // b [n, k], or [k, n] if transposed; float32 or int8
                       .Attr<bool>("transposed_a")
                       .Attr<bool>("transposed_b")
                       .Attr<std::string_view>("isa")
                       .Ret<bitnet::Floats>());  // c [m, n]
