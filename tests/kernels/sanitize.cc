// Every instruction set against plain loops, on buffers of exactly the right size and on several threads: for the
// address, undefined behaviour and thread sanitizers (test_sanitizers.py).

#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

#include "kernels.h"
#include "scaled_matmul.h"
#include "threads.h"

using namespace bitnet;

int64_t wrong_outputs(const MatmulKernels& kernels, Format format, int64_t m, int64_t n, int64_t k, int64_t groups) {
  Problem p = {format, m, n, groups, 0, nullptr, 0, nullptr, nullptr, nullptr};
  p.group_blocks = (k / groups + p.block_inputs() - 1) / p.block_inputs();
  p.x_stride = groups * p.group_inputs();
  const int64_t group_inputs = p.group_inputs(), base = field_base(format);

  std::vector<int8_t> x(m * p.x_stride), codes(n * p.x_stride);
  std::vector<uint8_t> w(p.panels() * p.panel_bytes());
  std::vector<int32_t> x_sums(m * groups), y(groups * m * n);
  std::vector<float> scale(n * groups), minimum(n * groups), activation(m, 0.5f), scaled(m * n);
  for (int64_t c = 0; c < p.x_stride; ++c) {
    if (c % group_inputs >= k / groups) continue;  // padding: zero
    for (int64_t row = 0; row < m; ++row) {
      x[row * p.x_stride + c] = static_cast<int8_t>(std::rand() % 3 ? std::rand() : -128);
    }
    const int64_t block = c / p.block_inputs(), input = c % p.block_inputs();
    int64_t weight = 1;  // of the field in its byte
    for (int64_t s = 0; s < input / 4; ++s) weight *= base;
    for (int64_t row = 0; row < n; ++row) {
      const int64_t field = std::rand() % (highest_field(format) + 1);
      codes[row * p.x_stride + c] = static_cast<int8_t>(multiplier(format) * field - offset(format));
      w[row / 16 * p.panel_bytes() + block * kBlockBytes + 4 * (row % 16) + input % 4] += field * weight;
    }
  }
  for (float& f : scale) f = static_cast<float>(std::rand()) / RAND_MAX;
  for (float& f : minimum) f = -static_cast<float>(std::rand()) / RAND_MAX;
  for (int64_t i = 0; i < m * groups; ++i) x_sums[i] = kernels.sum(x.data() + i * group_inputs, group_inputs);
  p.x = x.data(), p.x_sums = x_sums.data(), p.w = w.data(), p.y = y.data();
  {
    const int64_t grain = m == 1 ? 2 : 4;
    parallel_for((p.panels() + grain - 1) / grain, [&](int64_t item) {
      const int64_t end = std::min(p.panels(), (item + 1) * grain);
      kernels.matmul(p, item * grain, end);
      MatmulScales scales;
      scales.matrix = {scale.data(), false, groups};
      if (has_minimum(format)) scales.minimum = {minimum.data(), false, groups};
      scales.activation = activation.data();
      scaled_matmul(kernels, p, scales, scaled.data(), item * grain, end);
    });
  }

  int64_t wrong = 0;
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t r = 0; r < n; ++r) {
      float expected = 0;
      for (int64_t g = 0; g < groups; ++g) {
        int32_t sum = 0;
        for (int64_t c = g * group_inputs; c < (g + 1) * group_inputs; ++c) {
          sum += codes[r * p.x_stride + c] * x[row * p.x_stride + c];
        }
        wrong += sum != y[(g * m + row) * n + r];
        float term = static_cast<float>(sum) * scale[r * groups + g];
        if (has_minimum(format)) term += static_cast<float>(x_sums[row * groups + g]) * minimum[r * groups + g];
        expected += term;
      }
      wrong += expected * activation[row] != scaled[row * n + r];
    }
  }
  return wrong;
}

int main() {
  bitnet_kernels_set_thread_count(4);
  const int64_t shapes[][3] = {{1, 1, 1}, {3, 31, 1}, {37, 100, 1}, {65, 1100, 1}, {100, 640, 20}, {33, 96, 3}};
  int64_t wrong = 0, cases = 0;
  std::istringstream names(bitnet_kernels_available_isas());
  for (std::string isa; std::getline(names, isa, ',');) {
    const Kernels& kernels = *find_kernels(isa);
    for (const auto& [n, k, groups] : shapes) {
      for (Format format : kFormats) {
        for (int64_t m : {1, 2, 3, 4, 5, 6, 13}) {
          wrong += wrong_outputs(*kernels.integer, format, m, n, k, groups);
          ++cases;
        }
      }
    }
  }
  std::printf("%lld cases, %lld wrong\n", static_cast<long long>(cases), static_cast<long long>(wrong));
  return wrong != 0;
}
