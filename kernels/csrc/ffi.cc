// XLA custom call: checks of shapes and values, splitting over threads, bindings.

#include <algorithm>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "integer_matmul.h"
#include "isa.h"
#include "scaled_matmul.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace bitnet {
namespace {

// Work below which one thread is as fast as two: a helper of XLA's pool takes some microseconds to start.
constexpr int64_t kSerialBytes = 512 << 10;            // packed bytes, one row of x
constexpr int64_t kSerialProducts = int64_t{4} << 20;  // products, several rows of x
constexpr int64_t kItemBytes = 256 << 10;              // packed bytes of a piece of work: long runs read faster

using Activations = ffi::Buffer<ffi::S8, 2>;
using Codes = ffi::Buffer<ffi::U8, 3>;
using Sums = ffi::Buffer<ffi::S32, 3>;
using Floats = ffi::Buffer<ffi::F32, 2>;

ffi::Error invalid(std::string message) { return ffi::Error::InvalidArgument("bitnet_kernels: " + std::move(message)); }

template <typename Buffer>
std::string dims(const Buffer& buffer) {
  std::string text = "[";
  for (int64_t dim : buffer.dimensions()) text += (text.size() > 1 ? ", " : "") + std::to_string(dim);
  return text + "]";
}

// The rows of x, each padded with zeros to the inputs of the packed matrix where those are more.
std::vector<int8_t> pad_rows(const int8_t* x, int64_t m, int64_t k, int64_t padded) {
  std::vector<int8_t> rows(m * padded);
  for (int64_t row = 0; row < m; ++row) std::memcpy(rows.data() + row * padded, x + row * k, k);
  return rows;
}

// Fills a problem from the buffers of a call, or says what does not fit. y and x_sums stay empty.
ffi::Error make_problem(Activations x, Codes w, int64_t bits, int64_t groups, int64_t n, Problem& p) {
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1];
  if (bits != 1 && bits != 2) return invalid("bits=" + std::to_string(bits) + "; expected 1 (binary) or 2 (ternary)");
  const Format format = bits == 1 ? Format::kBinary : Format::kTernary2;
  p = {format, m, n, groups, 0, x.typed_data(), k, nullptr, w.typed_data(), nullptr};
  const int64_t blocks = (k + p.block_inputs() - 1) / p.block_inputs();
  if (groups < 1 || k < 1) return invalid("expected at least one scale group and one input; got x" + dims(x));
  if (w.dimensions()[0] != p.panels() || w.dimensions()[1] != blocks || w.dimensions()[2] != kBlockBytes) {
    return invalid("a packed [" + std::to_string(n) + ", " + std::to_string(k) + "] of " + std::to_string(bits) +
                   " bits has codes [" + std::to_string(p.panels()) + ", " + std::to_string(blocks) + ", 64]; got " +
                   dims(w));
  }
  if (groups > 1 && (k % groups != 0 || (k / groups) % 32 != 0)) {
    return invalid(std::to_string(groups) + " groups of k=" + std::to_string(k) +
                   "; expected groups of a multiple of 32 inputs");
  }
  if (k / groups > max_group_inputs(format)) {
    return invalid("k=" + std::to_string(k) + " in " + std::to_string(groups) +
                   " groups overflows int32; expected at most " + std::to_string(max_group_inputs(format)) +
                   " inputs a group");
  }
  p.group_blocks = blocks / groups;
  p.x_stride = blocks * p.block_inputs();
  return ffi::Error::Success();
}

// Prepares x and runs work(kernels, problem, begin, end) over all panels, on the threads that the size deserves.
template <typename Work>
ffi::Error run(ffi::ThreadPool& pool, Problem p, int64_t k, std::string_view isa, Work work) {
  const Kernels* kernels = find_kernels(isa);
  if (kernels == nullptr) {
    return invalid("isa=" + std::string(isa) + " is not available; expected one of " + bitnet_kernels_available_isas());
  }
  if (p.m == 0 || p.n == 0) return ffi::Error::Success();
  std::vector<int8_t> padded;
  if (p.x_stride != k) {
    padded = pad_rows(p.x, p.m, k, p.x_stride);
    p.x = padded.data();
  }
  const int64_t group_inputs = p.x_stride / p.groups;
  std::vector<int32_t> x_sums(p.m * p.groups);
  for (int64_t i = 0; i < p.m * p.groups; ++i) x_sums[i] = kernels->sum(p.x + i * group_inputs, group_inputs);
  p.x_sums = x_sums.data();

  const int64_t panels = p.panels(), bytes = panels * p.panel_bytes();
  const bool serial = p.m == 1 ? bytes < kSerialBytes : p.m * p.n * k < kSerialProducts;
  const int64_t threads = serial ? 1 : std::max<int64_t>(1, pool.num_threads());
  // Pieces of an even number of panels for the pairs of one row of x, of four for the tiles of several rows.
  const int64_t pairs = std::min(kItemBytes, bytes / threads) / p.panel_bytes() / 2;
  const int64_t grain = p.m == 1 ? std::max<int64_t>(1, pairs) * 2 : 4;
  parallel_for(pool, threads, (panels + grain - 1) / grain, [&](int64_t item) {
    work(*kernels, p, item * grain, std::min(panels, (item + 1) * grain));
  });
  return ffi::Error::Success();
}

ffi::Error integer_call(ffi::ThreadPool pool, Activations x, Codes w, int64_t bits, std::string_view isa,
                        ffi::Result<Sums> y) {
  Problem p;
  ffi::Error error = make_problem(x, w, bits, y->dimensions()[0], y->dimensions()[2], p);
  if (error.failure()) return error;
  if (y->dimensions()[1] != p.m) return invalid("expected y[groups, " + std::to_string(p.m) + ", n]; got y" + dims(*y));
  p.y = y->typed_data();
  const auto work = [](const Kernels& kernels, const Problem& p, int64_t begin, int64_t end) {
    kernels.matmul(p, begin, end);
  };
  return run(pool, p, x.dimensions()[1], isa, work);
}

ffi::Error scaled_call(ffi::ThreadPool pool, Activations x, Codes w, Floats scale, int64_t bits,
                       std::string_view isa, ffi::Result<Floats> y) {
  Problem p;
  const int64_t n = y->dimensions()[1], scale_rows = scale.dimensions()[0], groups = scale.dimensions()[1];
  ffi::Error error = make_problem(x, w, bits, groups, n, p);
  if (error.failure()) return error;
  if (y->dimensions()[0] != p.m) return invalid("expected y[" + std::to_string(p.m) + ", n]; got y" + dims(*y));
  if (scale_rows != n && (scale_rows != 1 || groups != 1)) {
    return invalid("expected scale[1, 1] or scale[" + std::to_string(n) + ", groups]; got scale" + dims(scale));
  }
  const float* scales = scale.typed_data();
  const int64_t stride = scale_rows == 1 ? 0 : groups;
  float* out = y->typed_data();
  const auto work = [=](const Kernels& kernels, const Problem& p, int64_t begin, int64_t end) {
    scaled_matmul(kernels, p, scales, stride, out, begin, end);
  };
  return run(pool, p, x.dimensions()[1], isa, work);
}

}  // namespace
}  // namespace bitnet

XLA_FFI_DEFINE_HANDLER_SYMBOL(bitnet_kernels_integer_matmul, bitnet::integer_call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<bitnet::Activations>()  // x [m, k]
                                  .Arg<bitnet::Codes>()        // codes [panels, blocks, 64]
                                  .Attr<int64_t>("bits")
                                  .Attr<std::string_view>("isa")
                                  .Ret<bitnet::Sums>());  // y [groups, m, n]

XLA_FFI_DEFINE_HANDLER_SYMBOL(bitnet_kernels_scaled_matmul, bitnet::scaled_call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<bitnet::Activations>()  // x [m, k]
                                  .Arg<bitnet::Codes>()        // codes [panels, blocks, 64]
                                  .Arg<bitnet::Floats>()       // scale [1, 1], [n, 1] or [n, groups]
                                  .Attr<int64_t>("bits")
                                  .Attr<std::string_view>("isa")
                                  .Ret<bitnet::Floats>());  // y [m, n]

// Headers newer than the runtime make registration fail and take XLA's whole CPU backend with it: Python compares
// first.
extern "C" int bitnet_kernels_ffi_api_minor() { return XLA_FFI_API_MINOR; }
