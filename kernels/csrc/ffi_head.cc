// XLA custom calls of the output head: checks of shapes, splitting over threads, bindings.

#include <algorithm>
#include <string>
#include <string_view>
#include <tuple>

#include "ffi_errors.h"
#include "float_mode.h"
#include "head.h"
#include "head_exact.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace bitnet {
namespace {

constexpr int64_t kItemBytes = 1 << 20;    // of the table, for few rows of x: long runs read faster
constexpr int64_t kTileBytes = 256 << 10;  // of the table, for many rows of x: stays in L2 ...
constexpr int64_t kTileXRows = 24;         // ... beside this number of rows of x
constexpr int64_t kRowStep = 8;            // whole tiles of every instruction set
constexpr int64_t kItemsPerThread = 4;

using Inputs = ffi::Buffer<ffi::F32, 2>;
using Table = ffi::Buffer<ffi::BF16, 2>;
using Logits = ffi::Buffer<ffi::F32, 2>;
using Digits = ffi::Buffer<ffi::S8, 2>;
using Sums = ffi::Buffer<ffi::S32, 2>;
using Floats = ffi::Buffer<ffi::F32, 1>;
using Norms = ffi::Buffer<ffi::F32, 2>;
using Counts = ffi::Buffer<ffi::S32, 1>;

// Runs rows(begin, end) over the n rows of a table, on all threads, in items of about item_bytes.
template <typename Rows>
void for_rows(int64_t n, int64_t row_bytes, int64_t item_bytes, Rows rows) {
  const int64_t wanted = std::min(item_bytes / row_bytes, n / (thread_count() * kItemsPerThread));
  const int64_t grain = std::max<int64_t>(1, wanted / kRowStep) * kRowStep;
  parallel_for((n + grain - 1) / grain, [=](int64_t item) {
    const FloatMode ieee(FloatMode::kIeee);
    rows(item * grain, std::min(n, (item + 1) * grain));
  });
}

// Fills a problem from the buffers of a call, or says what does not fit.
ffi::Error make_problem(Inputs x, Table table, Logits y, HeadProblem& p) {
  p = {x.dimensions()[0], table.dimensions()[0], x.dimensions()[1], x.typed_data(), table.typed_data(), y.typed_data()};
  if (table.dimensions()[1] != p.k || y.dimensions()[0] != p.m || y.dimensions()[1] != p.n) {
    return invalid("expected x[m, k], table[n, k] and y[m, n]; got x" + dims(x.dimensions()) + ", table" +
                   dims(table.dimensions()) + ", y" +
                   dims(y.dimensions()));
  }
  if (p.n < 1 || p.k < 1) return invalid("expected at least one output and input; got table" + dims(table.dimensions()));
  return ffi::Error::Success();
}

ffi::Error logits_call(Inputs x, Table table, std::string_view isa, ffi::Result<Logits> y) {
  HeadProblem p;
  const ffi::Error error = make_problem(x, table, *y, p);
  if (error.failure()) return error;
  const Kernels* kernels = find_kernels(isa);
  if (kernels == nullptr) return unknown_isa(isa);
  const HeadRows head_rows = kernels->floats->head_rows;
  const bool few = p.m < kRowStep;
  for_rows(p.n, 2 * p.k, few ? kItemBytes : kTileBytes, [=](int64_t begin, int64_t end) {
    HeadProblem part = p;
    for (int64_t row = 0; row < p.m; row += kTileXRows) {
      part.m = std::min(kTileXRows, p.m - row);
      part.x = p.inputs(row);
      part.y = p.output(row, 0);
      head_rows(part, begin, end);
    }
  });
  return ffi::Error::Success();
}

ffi::Error exact_call(Inputs x, Table table, Digits digits, Floats x_scale, Sums sums, Floats w_scale, Norms norms,
                      int64_t top, std::string_view isa, ffi::Result<Logits> y, ffi::Result<Counts> candidates) {
  ExactProblem p;
  const ffi::Error error = make_problem(x, table, *y, p.head);
  if (error.failure()) return error;
  const auto [m, n, k] = std::tuple(p.head.m, p.head.n, p.head.k);
  const auto has = [](const auto& buffer, std::initializer_list<int64_t> expected) {
    return std::equal(expected.begin(), expected.end(), buffer.dimensions().begin());
  };
  if (!has(digits, {2 * m, k}) || !has(x_scale, {m}) || !has(sums, {2 * m, n}) || !has(w_scale, {n}) ||
      !has(norms, {2, n}) || !has(*candidates, {m})) {
    return invalid("expected digits[2 m, k], x_scale[m], sums[2 m, n], w_scale[n], norms[2, n], candidates[m]; got x" +
                   dims(x.dimensions()) + ", table" + dims(table.dimensions()) + ", digits" + dims(digits.dimensions()) +
                   ", x_scale" + dims(x_scale.dimensions()) + ", sums" + dims(sums.dimensions()) + ", w_scale" +
                   dims(w_scale.dimensions()) + ", norms" + dims(norms.dimensions()) + ", candidates" +
                   dims(candidates->dimensions()));
  }
  if (k > kMaxExactInputs || top < 1) {
    return invalid("k=" + std::to_string(k) + ", top=" + std::to_string(top) + "; expected k of at most " +
                   std::to_string(kMaxExactInputs) + " and a top of at least 1");
  }
  const Kernels* kernels = find_kernels(isa);
  if (kernels == nullptr) return unknown_isa(isa);
  const HeadRows head_rows = kernels->floats->head_rows;
  p.digits = digits.typed_data();
  p.x_scale = x_scale.typed_data();
  p.sums = sums.typed_data();
  p.w_scale = w_scale.typed_data();
  p.norms = norms.typed_data();
  p.top = top;
  exact_top_logits(p, head_rows, candidates->typed_data());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace bitnet

BITNET_FFI_HANDLER(bitnet_kernels_bfloat16_logits, bitnet::logits_call,
                   ffi::Ffi::Bind()
                       .Arg<bitnet::Inputs>()  // x [m, k]
                       .Arg<bitnet::Table>()   // table [n, k]
                       .Attr<std::string_view>("isa")
                       .Ret<bitnet::Logits>());  // y [m, n]

BITNET_FFI_HANDLER(bitnet_kernels_exact_top_logits, bitnet::exact_call,
                   ffi::Ffi::Bind()
                       .Arg<bitnet::Inputs>()  // x [m, k]
                       .Arg<bitnet::Table>()   // table [n, k]
                       .Arg<bitnet::Digits>()  // digits [2 m, k]
                       .Arg<bitnet::Floats>()  // x_scale [m]
                       .Arg<bitnet::Sums>()    // sums [2 m, n]
                       .Arg<bitnet::Floats>()  // w_scale [n]
                       .Arg<bitnet::Norms>()   // norms [2, n]
                       .Attr<int64_t>("top")
                       .Attr<std::string_view>("isa")
                       .Ret<bitnet::Logits>()    // y [m, n]
                       .Ret<bitnet::Counts>());  // candidates [m]
