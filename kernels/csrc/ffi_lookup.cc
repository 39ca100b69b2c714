// XLA custom call: rows of a bfloat16 table, in float32. XLA's CPU cannot gather bfloat16, and would convert the whole
// table, as large as all the rest of a small model, to take a few rows.

#include <cstring>
#include <limits>
#include <string>

#include "ffi_errors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace bitnet {
namespace {

using Table = ffi::Buffer<ffi::BF16, 2>;
using Indices = ffi::Buffer<ffi::S32, 1>;
using Rows = ffi::Buffer<ffi::F32, 2>;

ffi::Error lookup_call(Table table, Indices indices, ffi::Result<Rows> rows) {
  const int64_t n = table.dimensions()[0], k = table.dimensions()[1], m = indices.dimensions()[0];
  if (rows->dimensions()[0] != m || rows->dimensions()[1] != k) {
    return invalid("expected rows[" + std::to_string(m) + ", " + std::to_string(k) + "] of table[n, k] and " +
                   std::to_string(m) + " indices; got rows" + dims(rows->dimensions()));
  }
  const uint16_t* values = reinterpret_cast<const uint16_t*>(table.typed_data());
  float* out = rows->typed_data();
  for (int64_t i = 0; i < m; ++i, out += k) {
    const int64_t index = indices.typed_data()[i];
    if (index < 0 || index >= n) {  // as jnp.take
      for (int64_t j = 0; j < k; ++j) out[j] = std::numeric_limits<float>::quiet_NaN();
      continue;
    }
    for (int64_t j = 0; j < k; ++j) {
      const uint32_t bits = uint32_t{values[index * k + j]} << 16;
      std::memcpy(out + j, &bits, sizeof(bits));
    }
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace bitnet

BITNET_FFI_HANDLER(bitnet_kernels_lookup, bitnet::lookup_call,
                   ffi::Ffi::Bind()
                       .Arg<bitnet::Table>()    // table [n, k]
                       .Arg<bitnet::Indices>()  // [m]
                       .Ret<bitnet::Rows>());   // [m, k]
