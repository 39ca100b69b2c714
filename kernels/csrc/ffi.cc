// XLA custom calls of the packed products: checks of shapes and values, splitting over threads, bindings.

#include <algorithm>
#include <cstring>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "activations.h"
#include "ffi_errors.h"
#include "integer_matmul.h"
#include "packed_product.h"
#include "processor.h"
#include "scaled_matmul.h"
#include "sign_matmul.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace bitnet {
namespace {

// Elements of x below which one thread quantizes as fast as two.
constexpr int64_t kSerialActivations = int64_t{1} << 15;

using Bytes = ffi::Buffer<ffi::S8, 2>;
using Codes = ffi::Buffer<ffi::U8, 3>;
using Floats = ffi::Buffer<ffi::F32, 2>;
using Sums = ffi::Buffer<ffi::S32, 3>;

// Fills a problem from a matrix and the shape of its result, or says what does not fit. x, x_sums and y stay empty.
ffi::Error make_problem(int64_t m, int64_t k, Codes w, int64_t format, int64_t groups, int64_t n, Problem& p) {
  if (format < 0 || format >= static_cast<int64_t>(std::size(kFormats))) {
    return invalid("format=" + std::to_string(format) + "; expected a number below " + std::to_string(std::size(kFormats)));
  }
  p = {static_cast<Format>(format), m, n, groups, 0, nullptr, 0, nullptr, w.typed_data(), nullptr, prefetch_distance()};
  if (groups < 1 || n < 1 || k < 1) {
    return invalid("expected at least one scale group, output and input; got " + std::to_string(groups) + " groups of [" +
                   std::to_string(n) + ", " + std::to_string(k) + "]");
  }
  if (groups > 1 && (k % groups != 0 || (k / groups) % 32 != 0)) {
    return invalid(std::to_string(groups) + " groups of k=" + std::to_string(k) +
                   "; expected groups of a multiple of 32 inputs");
  }
  const int64_t most = max_group_inputs(p.format);
  if (k / groups > most) {
    return invalid("k=" + std::to_string(k) + " in " + std::to_string(groups) + " groups overflows int32; expected at most " +
                   std::to_string(most) + " inputs a group");
  }
  p.group_blocks = (k / groups + p.block_inputs() - 1) / p.block_inputs();
  p.x_stride = groups * p.group_blocks * p.block_inputs();
  const auto got = w.dimensions();
  if (got[0] != p.panels() || got[1] != groups * p.group_blocks || got[2] != kBlockBytes) {
    return invalid("a matrix [" + std::to_string(n) + ", " + std::to_string(k) + "] of this format has codes [" +
                   std::to_string(p.panels()) + ", " + std::to_string(groups * p.group_blocks) + ", 64]; got " + dims(got));
  }
  return ffi::Error::Success();
}

ffi::Error integer_call(Bytes x, Codes w, int64_t format, std::string_view isa, ffi::Result<Sums> y) {
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1];
  std::vector<Problem> problems(1);
  Problem& p = problems[0];
  ffi::Error error = make_problem(m, k, w, format, y->dimensions()[0], y->dimensions()[2], p);
  if (error.failure()) return error;
  if (y->dimensions()[1] != m) return invalid("expected y[groups, " + std::to_string(m) + ", n]; got y" + dims(y->dimensions()));
  const Kernels* found = find_kernels(isa);
  if (found == nullptr) return unknown_isa(isa);
  if (m == 0) return ffi::Error::Success();
  const MatmulKernels& kernels = *found->integer;
  Rows rows;
  rows.prepare(x.typed_data(), k, k, kernels, p);
  p.y = y->typed_data();
  run(problems, nullptr, [&](size_t, const Problem& part, int64_t, int64_t begin, int64_t end) {
    kernels.matmul(part, begin, end);
  });
  return ffi::Error::Success();
}

// x as int8 codes [digits m, k] with one scale a row of x: what it holds already, or float32 quantized here. With two
// digits rows 2 i and 2 i + 1 are the high and the low one of row i.
struct Activations {
  const int8_t* codes;
  const float* scales = nullptr;

  static Activations of(ffi::AnyBuffer x, int64_t digits) {
    const int64_t m = x.dimensions()[0], k = x.dimensions()[1];
    if (x.element_type() == ffi::S8) return {x.typed_data<int8_t>()};
    // Kept from call to call: a large prompt would otherwise fault in fresh pages for every matrix.
    static thread_local std::vector<int8_t> codes;
    static thread_local std::vector<float> scales;
    codes.resize(digits * m * k);
    scales.resize(m);
    const float* rows = x.typed_data<float>();
    int8_t* to = codes.data();
    float* scale = scales.data();
    const auto quantize = [=](int64_t row) {
      int8_t* codes = to + digits * row * k;
      scale[row] = digits == 1 ? quantize_row(rows + row * k, k, codes)
                               : quantize_row_digits(rows + row * k, k, codes, codes + k);
    };
    if (m * k < kSerialActivations) {
      for (int64_t row = 0; row < m; ++row) quantize(row);
    } else {
      parallel_for(m, quantize);
    }
    return {to, scale};
  }
};

// The products of digits, as rows 2 i and 2 i + 1 of products [2 m, n], to rows i of y: rows [begin, end) of y, its
// columns [first, last). The same bits as join_digits of bitnet_kernels/reference.py, times the scale of the row.
void join_digits(const float* products, const float* activation, int64_t n, int64_t begin, int64_t end, int64_t first,
                 int64_t last, float* y) {
  for (int64_t row = begin; row < end; ++row) {
    const float* high = products + 2 * row * n;
    for (int64_t i = first; i < last; ++i) y[row * n + i] = (high[i] * 256.0f + high[n + i]) * activation[row];
  }
}

// Rows of signs as words, in the form that sign_matmul.h describes.
void prepare_signs(const int8_t* codes, int64_t k, Rows& rows, Problem& p) {
  const int64_t inputs = k / p.groups;
  rows.signs.assign(p.m * p.groups * p.group_blocks, 0);
  for (int64_t i = 0; i < p.m * p.groups; ++i) pack_signs(codes + i * inputs, inputs, rows.signs.data() + i * p.group_blocks);
  rows.sums.assign(p.m * p.groups, static_cast<int32_t>(inputs));
  p.x = reinterpret_cast<const int8_t*>(rows.signs.data());
  p.x_stride = p.groups * p.group_blocks * static_cast<int64_t>(sizeof(uint32_t));
  p.x_sums = rows.sums.data();
}

// Fills `to` from scales or minima, or says what does not fit.
ffi::Error scale_matrix(ffi::AnyBuffer scale, Widen widen, ScaleMatrix& to) {
  if (scale.dimensions().size() != 2 || (scale.element_type() != ffi::F32 && scale.element_type() != ffi::F16)) {
    return invalid("expected scales as float32 or float16 [n, groups]; got rank " +
                   std::to_string(scale.dimensions().size()));
  }
  const auto size = scale.dimensions();
  to = {scale.untyped_data(), scale.element_type() == ffi::F16, size[0] == 1 ? 0 : size[1], widen};
  return ffi::Error::Success();
}

ffi::Error scaled_call(ffi::AnyBuffer x, ffi::RemainingArgs matrices, ffi::Span<const int64_t> formats,
                       int64_t activation_bits, std::string_view isa, ffi::RemainingRets results) {
  if (x.dimensions().size() != 2 || (x.element_type() != ffi::S8 && x.element_type() != ffi::F32)) {
    return invalid("expected x as int8 or float32 [m, k]; got rank " + std::to_string(x.dimensions().size()));
  }
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1];
  const size_t count = formats.size();
  const auto with_minimum = [](int64_t format) { return has_minimum(static_cast<Format>(format)); };
  const size_t minima = std::count_if(formats.begin(), formats.end(), with_minimum);
  if (count == 0 || matrices.size() != 2 * count + minima || results.size() != count) {
    return invalid("expected codes, scale and, for uint4, minimum of each of " + std::to_string(count) +
                   " formats and results; got " + std::to_string(matrices.size()) + " arrays");
  }
  std::vector<Problem> problems(count);
  std::vector<MatmulScales> scales(count);
  std::vector<float*> outputs(count);
  const Kernels* found = find_kernels(isa);
  if (found == nullptr) return unknown_isa(isa);
  for (size_t i = 0, argument = 0; i < count; ++i) {
    const auto w = matrices.get<Codes>(argument++);
    const auto scale = matrices.get<ffi::AnyBuffer>(argument++);
    auto y = results.get<Floats>(i);
    if (!w) return w.error();
    if (!scale) return scale.error();
    if (!y) return y.error();
    ffi::Error error = scale_matrix(*scale, found->widen, scales[i].matrix);
    if (error.failure()) return error;
    const int64_t n = (*y)->dimensions()[1], rows = scale->dimensions()[0], groups = scale->dimensions()[1];
    error = make_problem(m, k, *w, formats[i], groups, n, problems[i]);
    if (error.failure()) return error;
    if ((*y)->dimensions()[0] != m) {
      return invalid("expected y[" + std::to_string(m) + ", n]; got y" + dims((*y)->dimensions()));
    }
    if (rows != n && (rows != 1 || groups != 1)) {
      return invalid("expected scale[1, 1] or scale[" + std::to_string(n) + ", groups]; got scale" +
                     dims(scale->dimensions()));
    }
    if (has_minimum(problems[i].format)) {
      const auto minimum = matrices.get<ffi::AnyBuffer>(argument++);
      if (!minimum) return minimum.error();
      error = scale_matrix(*minimum, found->widen, scales[i].minimum);
      if (error.failure()) return error;
      if (dims(minimum->dimensions()) != dims(scale->dimensions())) {
        return invalid("expected minimum" + dims(scale->dimensions()) + ", as the scale; got minimum" +
                       dims(minimum->dimensions()));
      }
    }
    outputs[i] = (*y)->typed_data();
  }
  const bool binary = std::all_of(problems.begin(), problems.end(), [](const Problem& p) { return p.format == Format::kBinary; });
  const bool codes = x.element_type() == ffi::S8, signs = activation_bits == 1;
  const int64_t digits = activation_bits == 16 ? 2 : 1;
  if (activation_bits != 8 && !(signs && binary && codes) && !(digits == 2 && !codes)) {
    return invalid("activation_bits=" + std::to_string(activation_bits) +
                   "; expected 8, 16 for float32, or 1 for int8 signs and binary matrices");
  }
  if (m == 0) return ffi::Error::Success();
  const MatmulKernels& kernels = signs ? *found->sign : *found->integer;

  const Activations activations = Activations::of(x, digits);
  std::vector<float*> products = outputs;  // those of digits are joined when a work item is done
  if (digits == 2) {
    static thread_local std::vector<float> scratch;
    int64_t size = 0;
    for (Problem& p : problems) {
      p.m *= digits;
      size += p.m * p.n;
    }
    scratch.resize(size);
    float* next = scratch.data();
    for (size_t i = 0; i < count; ++i) {
      products[i] = next;
      next += problems[i].m * problems[i].n;
    }
  }
  std::vector<Rows> rows(count);
  for (size_t i = 0; i < count; ++i) {
    Problem& p = problems[i];
    const auto alike = [&](const Problem& other) { return other.groups == p.groups && other.x_stride == p.x_stride; };
    const Problem* same = std::find_if(problems.data(), &p, alike);  // which has the same padding, and sums of groups
    if (signs) {
      prepare_signs(activations.codes, k, rows[i], p);
    } else if (same != &p) {
      p.x = same->x;
      p.x_sums = same->x_sums;
    } else {
      rows[i].prepare(activations.codes, k, k, kernels, p);
    }
    if (digits == 1) scales[i].activation = activations.scales;
  }
  run(problems, kernels.table_rows, [&](size_t i, const Problem& part, int64_t row, int64_t begin, int64_t end) {
    MatmulScales of_part = scales[i];
    if (of_part.activation != nullptr) of_part.activation += row;
    scaled_matmul(kernels, part, of_part, products[i] + row * part.n, begin, end);
    if (digits == 2) {
      const int64_t last = std::min(part.n, end * kPanelRows);
      join_digits(products[i], activations.scales, part.n, row / 2, (row + part.m) / 2, begin * kPanelRows, last,
                  outputs[i]);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace bitnet

BITNET_FFI_HANDLER(bitnet_kernels_integer_matmul, bitnet::integer_call,
                   ffi::Ffi::Bind()
                       .Arg<bitnet::Bytes>()  // x [m, k]
                       .Arg<bitnet::Codes>()  // codes [panels, blocks, 64]
                       .Attr<int64_t>("format")
                       .Attr<std::string_view>("isa")
                       .Ret<bitnet::Sums>());  // y [groups, m, n]

BITNET_FFI_HANDLER(bitnet_kernels_scaled_matmul, bitnet::scaled_call,
                   ffi::Ffi::Bind()
                       .Arg<ffi::AnyBuffer>()  // x [m, k], int8 codes or float32
                       .RemainingArgs()        // of each matrix codes [panels, blocks, 64], scale; of uint4 minimum
                       .Attr<ffi::Span<const int64_t>>("formats")
                       .Attr<int64_t>("activation_bits")
                       .Attr<std::string_view>("isa")
                       .RemainingRets());  // of each matrix y [m, n]

// Headers newer than the runtime make registration fail and take XLA's whole CPU backend with it: Python compares
// first.
extern "C" BITNET_EXPORT int bitnet_kernels_ffi_api_minor() noexcept { return XLA_FFI_API_MINOR; }
