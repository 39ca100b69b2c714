// Integer, sign and scaled products of every instruction set of this processor against plain loops, on buffers of exactly
// the right size and on two threads: run by itself, under the sanitizers (test_sanitizers.py) and in emulated processors
// (test_emulated.py). Prints a line for each instruction set; the exit status tells whether all outputs were right.

#include <random>
#include <thread>
#include <vector>

#include "kernels.h"
#include "scaled_matmul.h"
#include "sign_matmul.h"
#include "tally.h"

using namespace bitnet;

namespace {

struct Shape {
  int64_t n, k, groups;
};

// A product: codes[n][x_stride], zero in padding, also packed; its sums by plain loops, int32 [groups, m, n].
struct Case {
  std::vector<int8_t> x, codes;
  std::vector<uint8_t> w;
  std::vector<int32_t> sums;
  Problem p;

  void add_up() {
    sums.clear();
    for (int64_t g = 0; g < p.groups; ++g) {
      for (int64_t row = 0; row < p.m; ++row) {
        const int8_t* inputs = x.data() + row * p.x_stride + g * p.group_inputs();
        for (int64_t r = 0; r < p.n; ++r) {
          const int8_t* weights = codes.data() + r * p.x_stride + g * p.group_inputs();
          int32_t sum = 0;
          for (int64_t i = 0; i < p.group_inputs(); ++i) sum += weights[i] * inputs[i];
          sums.push_back(sum);
        }
      }
    }
  }
  // With the first m rows of x only, on buffers of their size.
  Case first_rows(int64_t m) const {
    Case c = {{x.begin(), x.begin() + m * p.x_stride}, codes, w, {}, p};
    for (int64_t g = 0; g < p.groups; ++g) {
      c.sums.insert(c.sums.end(), sums.begin() + g * p.m * p.n, sums.begin() + (g * p.m + m) * p.n);
    }
    c.p.m = m, c.p.x = c.x.data(), c.p.w = c.w.data();
    return c;
  }
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
  c.add_up();
  return c;
}

// The sum of every group of activations: int32 [m, groups].
std::vector<int32_t> sums_of_x(const MatmulKernels& kernels, const Problem& p) {
  std::vector<int32_t> x_sums(p.m * p.groups);
  for (size_t i = 0; i < x_sums.size(); ++i) x_sums[i] = kernels.sum(p.x + i * p.group_inputs(), p.group_inputs());
  return x_sums;
}

// run(begin, end) for the two halves of the panels, on two threads.
template <typename Run>
void in_halves(int64_t panels, const Run& run) {
  const int64_t middle = (panels + 1) / 2;
  std::thread helper([&] {
    if (middle < panels) run(middle, panels);
  });
  run(0, middle);
  helper.join();
}

int64_t wrong_outputs(const MatmulKernels& kernels, Problem p, const std::vector<int32_t>& expected) {
  std::vector<int32_t> y(expected.size());
  p.y = y.data();
  in_halves(p.panels(), [&](int64_t begin, int64_t end) { kernels.matmul(p, begin, end); });
  int64_t wrong = 0;
  for (size_t i = 0; i < y.size(); ++i) wrong += y[i] != expected[i];
  return wrong;
}

void test_sums(std::vector<Tally>& tallies, const Case& c) {
  for (Tally& tally : tallies) {
    const MatmulKernels& kernels = *tally.kernels.integer;
    const std::vector<int32_t> x_sums = sums_of_x(kernels, c.p);
    Problem p = c.p;
    p.x_sums = x_sums.data();
    tally.add(wrong_outputs(kernels, p, c.sums));
  }
}

// The same for a binary matrix and the signs of c.x, which are packed into words.
void test_signs(std::vector<Tally>& tallies, Case& c, int64_t used) {
  Problem p = c.p;
  std::vector<uint32_t> words(p.m * p.groups * p.group_blocks);
  std::vector<int32_t> inputs(p.m * p.groups, static_cast<int32_t>(used));
  for (int64_t i = 0; i < p.m * p.groups; ++i) {
    int8_t* x = c.x.data() + i * p.group_inputs();
    for (int64_t j = 0; j < used; ++j) x[j] = x[j] < 0 ? -1 : 1;
    pack_signs(x, used, words.data() + i * p.group_blocks);
  }
  c.add_up();
  p.x = reinterpret_cast<const int8_t*>(words.data());
  p.x_stride = 4 * p.groups * p.group_blocks;
  p.x_sums = inputs.data();
  for (Tally& tally : tallies) tally.add(wrong_outputs(*tally.kernels.sign, p, c.sums));
}

// Rescaled sums, to the bit those of the scalar kernels, which write the sums of all groups to memory first.
void test_scaled(std::vector<Tally>& tallies, const Case& c, bool half, std::mt19937& random) {
  Problem p = c.p;
  const std::vector<int32_t> x_sums = sums_of_x(*find_kernels("scalar")->integer, p);
  p.x_sums = x_sums.data();
  std::vector<float> floats[2], activation(p.m);
  std::vector<uint16_t> halves[2];
  for (int kind = 0; kind < 2; ++kind) {  // scales and minima; as float16 all but infinity and NaN
    for (int64_t i = 0; i < p.n * p.groups; ++i) {
      floats[kind].push_back(0.0137f * static_cast<float>(random() % 2001) - 13.7f);
      halves[kind].push_back(static_cast<uint16_t>((random() & 1) << 15 | random() % 0x7c00));
    }
  }
  for (float& scale : activation) scale = static_cast<float>(random() % 1000) * 0.001f;
  const auto run = [&](const Kernels& with) {
    MatmulScales s;
    for (int kind = 0; kind < 2; ++kind) {
      const void* data = half ? static_cast<const void*>(halves[kind].data()) : floats[kind].data();
      (kind == 0 ? s.matrix : s.minimum) = {data, half, p.groups, with.widen};
    }
    if (!has_minimum(p.format)) s.minimum = {};
    s.activation = activation.data();
    std::vector<float> y(p.m * p.n);
    in_halves(p.panels(), [&](int64_t begin, int64_t end) { scaled_matmul(*with.integer, p, s, y.data(), begin, end); });
    return y;
  };
  compare(tallies, 0, run(*find_kernels("scalar")), run);
}

}  // namespace

int main() {
  // One of everything; odd sizes; several panels of every instruction set's tiles; more inputs than a tile; groups.
  const Shape shapes[] = {{1, 1, 1},     {3, 31, 1},     {37, 100, 1},  {129, 160, 1},
                          {65, 2100, 1}, {100, 640, 20}, {33, 288, 3}, {290, 520, 1},
                          {18, 2592, 81}};
  std::vector<Tally> tallies = ::tallies();
  std::mt19937 random(1);
  for (Format format : kFormats) {
    for (const Shape& shape : shapes) {
      const Case random_fields = make_case(format, 20, shape, false, random);
      const Case extremes = make_case(format, 20, shape, true, random);
      for (int64_t m = 1; m <= 20; ++m) {
        const Case c = (m % 4 == 3 ? extremes : random_fields).first_rows(m);
        test_sums(tallies, c);
        if (m < 4 || m > 17) test_scaled(tallies, c, m % 2 == 0, random);
      }
    }
    const Case longest = make_case(format, 2, {20, max_group_inputs(format), 1}, true, random);
    for (int64_t m : {1, 2}) test_sums(tallies, longest.first_rows(m));
    for (int64_t m : {17, 33, 70}) test_sums(tallies, make_case(format, m, {20, 300, 1}, m != 33, random));
  }
  for (const Shape& shape : shapes) {
    for (int64_t m = 1; m <= 9; ++m) {
      Case c = make_case(Format::kBinary, m, shape, false, random);
      test_signs(tallies, c, shape.k / shape.groups);
    }
  }
  return report(tallies);
}
