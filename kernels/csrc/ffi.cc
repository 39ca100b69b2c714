// XLA custom call: checks of shapes and values, splitting over threads, bindings.

#include <algorithm>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "integer_matmul.h"
#include "isa.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace bitnet {
namespace {

// Work below which one thread is as fast as two: a helper of XLA's pool takes some microseconds to start.
constexpr int64_t kSerialBytes = 512 << 10;             // packed bytes, one row of x
constexpr int64_t kSerialProducts = int64_t{4} << 20;   // products, several rows of x
constexpr int64_t kItemBytes = 64 << 10;                // packed bytes of a piece of work

using Activations = ffi::Buffer<ffi::S8, 2>;
using Codes = ffi::Buffer<ffi::U8, 3>;
using Sums = ffi::Buffer<ffi::S32, 3>;

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

ffi::Error integer_matmul(ffi::ThreadPool pool, Activations x, Codes w, int64_t bits, std::string_view isa,
                          ffi::Result<Sums> y) {
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1];
  const int64_t groups = y->dimensions()[0], n = y->dimensions()[2];
  const Kernels* kernels = find_kernels(isa);
  if (kernels == nullptr) {
    return invalid("isa=" + std::string(isa) + " is not available; expected one of " + bitnet_kernels_available_isas());
  }
  if (bits != 1 && bits != 2) return invalid("bits=" + std::to_string(bits) + "; expected 1 (binary) or 2 (ternary)");
  Problem p = {bits, m, n, groups, 0, x.typed_data(), k, nullptr, w.typed_data(), y->typed_data()};
  const int64_t blocks = (k + p.block_inputs() - 1) / p.block_inputs();
  if (y->dimensions()[1] != m || groups < 1 || k < 1) {
    return invalid("x" + dims(x) + " gives y[groups, " + std::to_string(m) + ", n]; got y" + dims(*y));
  }
  if (w.dimensions()[0] != p.panels() || w.dimensions()[1] != blocks || w.dimensions()[2] != kBlockBytes) {
    return invalid("a packed [" + std::to_string(n) + ", " + std::to_string(k) + "] of " + std::to_string(bits) +
                   " bits has codes [" + std::to_string(p.panels()) + ", " + std::to_string(blocks) + ", 64]; got " + dims(w));
  }
  if (groups > 1 && (k % groups != 0 || (k / groups) % 32 != 0)) {
    return invalid(std::to_string(groups) + " groups of k=" + std::to_string(k) + "; expected groups of a multiple of 32 inputs");
  }
  if (k / groups > kMaxGroupInputs) {
    return invalid("k=" + std::to_string(k) + " in " + std::to_string(groups) + " groups overflows int32; expected at most " +
                   std::to_string(kMaxGroupInputs) + " inputs a group");
  }
  if (m == 0 || n == 0) return ffi::Error::Success();

  p.group_blocks = blocks / groups;
  p.x_stride = blocks * p.block_inputs();
  std::vector<int8_t> padded;
  if (p.x_stride != k) {
    padded = pad_rows(p.x, m, k, p.x_stride);
    p.x = padded.data();
  }
  std::vector<int32_t> x_sums(groups * m);
  const int64_t group_inputs = p.x_stride / groups;
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t row = 0; row < m; ++row) {
      x_sums[g * m + row] = kernels->sum(p.x + row * p.x_stride + g * group_inputs, group_inputs);
    }
  }
  p.x_sums = x_sums.data();

  const int64_t panels = p.panels(), bytes = panels * p.panel_bytes();
  const bool serial = m == 1 ? bytes < kSerialBytes : m * n * k < kSerialProducts;
  const int64_t threads = serial ? 1 : std::max<int64_t>(1, pool.num_threads());
  if (threads == 1) {
    kernels->matmul(p, 0, panels);
    return ffi::Error::Success();
  }
  // Pieces of an even number of panels for the pairs of decode, of four for the tiles of several rows.
  const int64_t grain = m == 1 ? std::max<int64_t>(2, kItemBytes / p.panel_bytes() / 2 * 2) : 4;
  parallel_for(pool, threads, (panels + grain - 1) / grain, [&](int64_t item) {
    kernels->matmul(p, item * grain, std::min(panels, (item + 1) * grain));
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace bitnet

XLA_FFI_DEFINE_HANDLER_SYMBOL(bitnet_kernels_integer_matmul, bitnet::integer_matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<bitnet::Activations>()  // x [m, k]
                                  .Arg<bitnet::Codes>()        // codes [panels, blocks, 64]
                                  .Attr<int64_t>("bits")
                                  .Attr<std::string_view>("isa")
                                  .Ret<bitnet::Sums>());  // y [groups, m, n]

// Headers newer than the runtime make registration fail and take XLA's whole CPU backend with it: Python compares first.
extern "C" int bitnet_kernels_ffi_api_minor() { return XLA_FFI_API_MINOR; }
