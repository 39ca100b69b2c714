// XLA custom call: RMSNorm of rows. XLA's CPU splits a norm into four small kernels, each with the overhead of a call.

#include <cmath>
#include <cstdint>
#include <string>

#include "compiler.h"
#include "ffi_errors.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace bitnet {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kSerialElements = int64_t{1} << 15;  // of x, below which one thread is as fast as two

// Squares are summed in kLanes lanes (elements i, i + 16, ..), then in a tree of halves: a row has the same bits
// whatever the other rows, the number of threads and the instruction set.
float sum_of_squares(const float* x, int64_t k) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    BITNET_UNROLL
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += x[i + j] * x[i + j];
  }
  for (int64_t j = 0; i + j < k; ++j) lanes[j] += x[i + j] * x[i + j];
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  }
  return lanes[0];
}

void normalize(const float* x, const float* gain, int64_t k, float eps, float* y) {
  const float factor = 1.0f / std::sqrt(sum_of_squares(x, k) / static_cast<float>(k) + eps);
  if (gain == nullptr) {
    for (int64_t i = 0; i < k; ++i) y[i] = x[i] * factor;
  } else {
    for (int64_t i = 0; i < k; ++i) y[i] = x[i] * factor * gain[i];
  }
}

using Rows = ffi::Buffer<ffi::F32, 2>;

ffi::Error norm_call(Rows x, Rows gain, float eps, ffi::Result<Rows> y) {
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1], gains = gain.dimensions()[0];
  if (dims(y->dimensions()) != dims(x.dimensions()) || gain.dimensions()[1] != k || gains > 1) {
    return invalid("expected x[m, k], gain[1, k] or [0, k], and y as x; got x" + dims(x.dimensions()) + ", gain" +
                   dims(gain.dimensions()) + ", y" + dims(y->dimensions()));
  }
  const float* from = x.typed_data();
  const float* factors = gains == 0 ? nullptr : gain.typed_data();
  float* to = y->typed_data();
  const auto row = [=](int64_t i) { normalize(from + i * k, factors, k, eps, to + i * k); };
  if (m * k < kSerialElements) {
    for (int64_t i = 0; i < m; ++i) row(i);
  } else {
    parallel_for(m, row);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace bitnet

BITNET_FFI_HANDLER(bitnet_kernels_rms_norm, bitnet::norm_call,
                   ffi::Ffi::Bind()
                       .Arg<bitnet::Rows>()  // x [m, k]
                       .Arg<bitnet::Rows>()  // gain [1, k], [0, k] if there is none
                       .Attr<float>("eps")
                       .Ret<bitnet::Rows>());  // y [m, k]
