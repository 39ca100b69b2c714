// XLA custom call: products of two matrices of integer codes, the second packed on the way, for training.

#include <cstdint>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "code_panels.h"
#include "ffi_errors.h"
#include "packed_product.h"
#include "scaled_matmul.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace bitnet {
namespace {

using Codes = ffi::Buffer<ffi::S8, 2>;
using Sums = ffi::Buffer<ffi::F32, 3>;

// Each scale group of inputs is multiplied as a separate problem.
ffi::Error code_matmul_call(Codes x, Codes w, int64_t format, std::string_view isa, ffi::Result<Sums> y) {
  const int64_t groups = y->dimensions()[0], m = y->dimensions()[1], n = y->dimensions()[2], k = x.dimensions()[1];
  if (format < 0 || format >= static_cast<int64_t>(std::size(kFormats))) {
    return invalid("format=" + std::to_string(format) + "; expected a number below " + std::to_string(std::size(kFormats)));
  }
  if (groups < 1 || k < 1 || k % groups != 0 || w.dimensions()[1] != k || x.dimensions()[0] != m || w.dimensions()[0] != n) {
    return invalid("expected x[m, k], w[n, k] and y[groups, m, n], k a multiple of groups; got x" + dims(x.dimensions()) +
                   ", w" + dims(w.dimensions()) + ", y" + dims(y->dimensions()));
  }
  const Format form = static_cast<Format>(format);
  const int64_t inputs = k / groups;
  if (inputs > max_group_inputs(form)) {
    return invalid("k=" + std::to_string(k) + " in " + std::to_string(groups) + " groups overflows int32; expected at most " +
                   std::to_string(max_group_inputs(form)) + " inputs a group");
  }
  const Kernels* found = find_kernels(isa);
  if (found == nullptr) return unknown_isa(isa);
  if (m == 0 || n == 0) return ffi::Error::Success();
  const MatmulKernels& kernels = *found->integer;

  std::vector<Problem> problems(groups);
  std::vector<Rows> rows(groups);
  const int64_t blocks = divide_up(inputs, block_inputs(form));
  Problem first = {form, m, n, 1, blocks, nullptr, blocks * block_inputs(form), nullptr, nullptr, nullptr};
  static thread_local std::vector<uint8_t> packed;  // kept from call to call: fresh pages would be faulted in
  packed.resize(groups * first.panels() * first.panel_bytes());
  uint8_t* const to = packed.data();
  const int8_t* const codes = w.typed_data();
  parallel_for(groups * first.panels(), [=](int64_t item) {
    const int64_t group = item / first.panels(), panel = item % first.panels();
    pack_panel(form, codes + panel * kPanelRows * k + group * inputs, k, first.panel_rows(panel), inputs, blocks,
               to + item * first.panel_bytes());
  });
  for (int64_t g = 0; g < groups; ++g) {
    problems[g] = first;
    problems[g].w = to + g * first.panels() * first.panel_bytes();
    rows[g].prepare(x.typed_data() + g * inputs, inputs, k, kernels, problems[g]);
  }
  const float one = 1.0f;
  const MatmulScales unscaled = {{&one, false, 0, found->widen}, {}, nullptr};
  float* const sums = y->typed_data();
  run(problems, kernels.table_rows, [&](size_t group, const Problem& part, int64_t row, int64_t begin, int64_t end) {
    scaled_matmul(kernels, part, unscaled, sums + (static_cast<int64_t>(group) * m + row) * n, begin, end);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace bitnet

BITNET_FFI_HANDLER(bitnet_kernels_code_matmul, bitnet::code_matmul_call,
                   ffi::Ffi::Bind()
                       .Arg<bitnet::Codes>()  // x [m, k]
                       .Arg<bitnet::Codes>()  // w [n, k]
                       .Attr<int64_t>("format")  // of w
                       .Attr<std::string_view>("isa")
                       .Ret<bitnet::Sums>());  // y [groups, m, n]
