// Integer, sign and scaled products of every instruction set of this processor against plain loops, on buffers of exactly
// the right size and on two threads: run by itself, under the sanitizers (test_sanitizers.py) and in emulated processors (test_emulated.py). Prints a line
// for each instruction set; the exit status tells whether all outputs were right.

#include <cstdio>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"
#include "scaled_matmul.h"
#include "sign_matmul.h"

using namespace bitnet;

namespace {

struct Shape {
  int64_t n, k, groups;
};

// Sums and codes whose layout is that of the product: codes[n][x_stride], zero in padding.
struct Case {
  std::vector<int8_t> x, codes;
  std::vector<uint8_t> w;
  Problem p;
};

// Activations and fields are random (every second activation -128 or 127), or at one of their extremes everywhere.
Case make_case(Format format, int64_t m, const Shape& shape, bool extreme, std::mt19937& random) {
  Case c;
  c.p = {format, m, shape.n, shape.groups, 0, nullptr, 0, nullptr, nullptr, nullptr};
  const int64_t used = shape.k / shape.groups;
  c.p.group_blocks = (used + c.p.block_inputs() - 1) / c.p.block_inputs();
  c.p.x_stride = shape.groups * c.p.group_inputs();
  c.x.resize(m * c.p.x_stride);
  c.codes.resize(shape.n * c.p.x_stride);
  c.w.resize(c.p.panels() * c.p.panel_bytes());
  for (int64_t i = 0; i < c.p.x_stride; ++i) {
    if (i % c.p.group_inputs() >= used) continue;
    for (int64_t row = 0; row < m; ++row) {
      const uint32_t bits = random();
      const bool low = extreme ? row % 2 : bits & 1, ends = extreme || (bits & 2);
      c.x[row * c.p.x_stride + i] = static_cast<int8_t>(ends ? (low ? -128 : 127) : static_cast<int32_t>(bits >> 24));
    }
    const int64_t block = i / c.p.block_inputs(), input = i % c.p.block_inputs();
    int64_t weight = 1;  // of the field in its byte
    for (int64_t s = 0; s < input / 4; ++s) weight *= field_base(format);
    for (int64_t row = 0; row < shape.n; ++row) {
      const int64_t highest = highest_field(format);
      const int64_t field = extreme ? (row / 2 % 2 ? 0 : highest) : random() % (highest + 1);
      c.codes[row * c.p.x_stride + i] = static_cast<int8_t>(multiplier(format) * field - offset(format));
      uint8_t& byte = c.w[row / 16 * c.p.panel_bytes() + block * kBlockBytes + 4 * (row % 16) + input % 4];
      byte = static_cast<uint8_t>(byte + field * weight);
    }
  }
  c.p.x = c.x.data();
  c.p.w = c.w.data();
  return c;
}

// Outputs of the two halves of the panels, on two threads, that are not those of plain loops over c.x and c.codes.
// p: c.p, or the same product with activations in another form.
int64_t wrong_outputs(const MatmulKernels& kernels, const Case& c, Problem p) {
  const int64_t inputs = p.group_inputs(), middle = (p.panels() + 1) / 2;
  std::vector<int32_t> y(p.groups * p.m * p.n);
  p.y = y.data();
  std::thread helper([&] { kernels.matmul(p, middle, p.panels()); });
  kernels.matmul(p, 0, middle);
  helper.join();

  int64_t wrong = 0;
  for (int64_t g = 0; g < p.groups; ++g) {
    for (int64_t row = 0; row < p.m; ++row) {
      const int8_t* x = c.p.inputs(row, g, 0);
      for (int64_t r = 0; r < p.n; ++r) {
        const int8_t* codes = c.codes.data() + r * c.p.x_stride + g * inputs;
        int32_t sum = 0;
        for (int64_t i = 0; i < inputs; ++i) sum += codes[i] * x[i];
        wrong += sum != y[(g * p.m + row) * p.n + r];
      }
    }
  }
  return wrong;
}

int64_t wrong_outputs(const MatmulKernels& kernels, const Case& c) {
  Problem p = c.p;
  std::vector<int32_t> x_sums(p.m * p.groups);
  for (size_t i = 0; i < x_sums.size(); ++i) x_sums[i] = kernels.sum(p.x + i * p.group_inputs(), p.group_inputs());
  p.x_sums = x_sums.data();
  return wrong_outputs(kernels, c, p);
}

// The same for a binary matrix and the signs of c.x, which are packed into words.
int64_t wrong_sign_outputs(const MatmulKernels& kernels, Case& c, int64_t used) {
  Problem p = c.p;
  std::vector<uint32_t> words(p.m * p.groups * p.group_blocks);
  std::vector<int32_t> inputs(p.m * p.groups, static_cast<int32_t>(used));
  for (int64_t i = 0; i < p.m * p.groups; ++i) {
    int8_t* x = c.x.data() + i * p.group_inputs();
    for (int64_t j = 0; j < used; ++j) x[j] = x[j] < 0 ? -1 : 1;
    pack_signs(x, used, words.data() + i * p.group_blocks);
  }
  p.x = reinterpret_cast<const int8_t*>(words.data());
  p.x_stride = 4 * p.groups * p.group_blocks;
  p.x_sums = inputs.data();
  return wrong_outputs(kernels, c, p);
}

// Bits of float32 results that are not those of the scalar kernels, which write the sums of all groups to memory first.
int64_t wrong_scaled(const Kernels& kernels, const Case& c, bool half, std::mt19937& random) {
  const Kernels& scalar = *find_kernels("scalar");
  Problem p = c.p;
  std::vector<int32_t> x_sums(p.m * p.groups);
  for (size_t i = 0; i < x_sums.size(); ++i) {
    x_sums[i] = scalar.integer->sum(p.x + i * p.group_inputs(), p.group_inputs());
  }
  p.x_sums = x_sums.data();
  std::vector<float> floats[2], activation(p.m);
  std::vector<uint16_t> halves[2];
  for (int kind = 0; kind < 2; ++kind) {  // scales and minima; as float16 all but infinity and NaN
    for (int64_t i = 0; i < p.n * p.groups; ++i) {
      floats[kind].push_back(static_cast<float>(random() % 2001) - 1000.0f);
      halves[kind].push_back(static_cast<uint16_t>((random() & 1) << 15 | random() % 0x7c00));
    }
  }
  for (float& scale : activation) scale = static_cast<float>(random() % 1000) * 0.001f;
  const auto run = [&](const Kernels& with, int64_t begin, int64_t end, std::vector<float>& y) {
    MatmulScales s;
    for (int kind = 0; kind < 2; ++kind) {
      const void* data = half ? static_cast<const void*>(halves[kind].data()) : floats[kind].data();
      (kind == 0 ? s.matrix : s.minimum) = {data, half, p.groups, with.widen};
    }
    if (!has_minimum(p.format)) s.minimum = {};
    s.activation = activation.data();
    scaled_matmul(*with.integer, p, s, y.data(), begin, end);
  };
  std::vector<float> expected(p.m * p.n), y(p.m * p.n);
  const int64_t middle = (p.panels() + 1) / 2;
  run(scalar, 0, p.panels(), expected);
  std::thread helper([&] {
    if (middle < p.panels()) run(kernels, middle, p.panels(), y);
  });
  run(kernels, 0, middle, y);
  helper.join();
  int64_t wrong = 0;
  for (size_t i = 0; i < y.size(); ++i) wrong += std::memcmp(&y[i], &expected[i], sizeof(float)) != 0;
  return wrong;
}

}  // namespace

int main() {
  // One of everything; odd sizes; several panels of every instruction set's tiles; more inputs than a tile; groups.
  const Shape shapes[] = {{1, 1, 1},     {3, 31, 1},     {37, 100, 1},  {129, 160, 1},
                          {65, 2100, 1}, {100, 640, 20}, {33, 288, 3}, {290, 520, 1},
                          {18, 2592, 81}};
  int64_t all_wrong = 0;
  std::istringstream names(bitnet_kernels_available_isas());
  for (std::string isa; std::getline(names, isa, ',');) {
    const MatmulKernels& kernels = *find_kernels(isa)->integer;
    std::mt19937 random(1);
    int64_t wrong = 0, cases = 0;
    for (Format format : kFormats) {
      for (const Shape& shape : shapes) {
        for (int64_t m = 1; m <= 20; ++m, ++cases) {
          Case c = make_case(format, m, shape, m % 4 == 3, random);
          wrong += wrong_outputs(kernels, c);
          if (m < 4 || m > 17) wrong += wrong_scaled(*find_kernels(isa), c, m % 2 == 0, random);
        }
      }
      for (int64_t m : {1, 2, 17, 33, 70}) {
        Case c = make_case(format, m, {20, m < 3 ? max_group_inputs(format) : 300, 1}, m != 33, random);
        wrong += wrong_outputs(kernels, c);
        ++cases;
      }
    }
    const MatmulKernels& sign_kernels = *find_kernels(isa)->sign;
    for (const Shape& shape : shapes) {
      for (int64_t m = 1; m <= 9; ++m, ++cases) {
        Case c = make_case(Format::kBinary, m, shape, false, random);
        wrong += wrong_sign_outputs(sign_kernels, c, shape.k / shape.groups);
      }
    }
    std::printf("%s: %d cases, %d wrong\n", isa.c_str(), static_cast<int>(cases), static_cast<int>(wrong));
    all_wrong += wrong;
  }
  return all_wrong != 0;
}
