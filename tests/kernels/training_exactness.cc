// The products and the attention gradient of training, on every instruction set of this processor: to the bit those of the
// scalar loops, which are held to plain loops in double; codes packed on the way against plain integer sums. Run by
// itself like float_exactness.cc.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "attention_gradient.h"
#include "code_panels.h"
#include "float_matmul.h"
#include "kernels.h"
#include "packed_product.h"
#include "threads.h"

using namespace bitnet;

namespace {

std::mt19937 source(1);

float normal() { return std::normal_distribution<float>()(source); }

std::vector<float> normals(int64_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = normal();
  return values;
}

int64_t differing(const std::vector<float>& a, const std::vector<float>& b) {
  int64_t count = 0;
  for (size_t i = 0; i < a.size(); ++i) count += std::memcmp(&a[i], &b[i], sizeof(float)) != 0;
  return count;
}

template <typename T>
Operand<T> operand(const std::vector<T>& data, int64_t rows, int64_t k, bool transposed) {
  return transposed ? Operand<T>{data.data(), 1, rows} : Operand<T>{data.data(), k, 1};
}

int64_t wrong_product(const FloatMatmulKernels& kernels, int64_t m, int64_t n, int64_t k, int layout) {
  source.seed(3);
  const bool transposed_a = layout & 1, transposed_b = layout & 2, of_codes = layout & 4;
  const std::vector<float> a = normals(m * k), b = normals(n * k);
  std::vector<int8_t> codes(n * k);
  for (int8_t& code : codes) code = static_cast<int8_t>(source() % 256);
  const auto run = [&](const FloatMatmulKernels& with) {
    std::vector<float> c(m * n, -1.0f);
    FloatMatmul p = {m, n, k, operand(a, m, k, transposed_a), {}, c.data()};
    if (of_codes) {
      p.b.codes = operand(codes, n, k, transposed_b);
    } else {
      p.b.floats = operand(b, n, k, transposed_b);
    }
    float_matmul(with, p);
    return c;
  };
  const std::vector<float> c = run(kernels), scalar = run(find_kernels("scalar")->floats->matmul);
  int64_t wrong = differing(c, scalar);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0, size = 0;
      for (int64_t l = 0; l < k; ++l) {
        const double y = of_codes ? *operand(codes, n, k, transposed_b).at(j, l) : *operand(b, n, k, transposed_b).at(j, l);
        const double product = y * *operand(a, m, k, transposed_a).at(i, l);
        sum += product;
        size += std::abs(product);
      }
      wrong += !(std::abs(scalar[i * n + j] - sum) <= (k + 1) * 0x1p-24 * size);
    }
  }
  return wrong;
}

int64_t wrong_gradient(const FloatKernels& kernels, int64_t tokens, int64_t keys, int64_t heads, int64_t kv_heads,
                       int64_t size) {
  source.seed(5);
  const int64_t batch = 2, queries = batch * tokens * heads * size, stored = batch * keys * kv_heads * size;
  const std::vector<float> q = normals(queries), k = normals(stored), v = normals(stored), dout = normals(queries);
  std::vector<uint8_t> visible(batch * tokens * keys);
  for (int64_t i = 0; i < batch * tokens; ++i) {  // causal, full, with holes, nothing
    for (int64_t j = 0; j < keys; ++j) {
      visible[i * keys + j] = i % 4 == 0 ? j <= i % tokens : i % 4 == 1 ? 1 : i % 4 == 2 ? source() % 3 == 0 : 0;
    }
  }
  const auto run = [&](const FloatKernels& with) {
    std::vector<float> result(queries + 2 * stored, -1.0f);
    AttentionGradient p{};
    p.batch = batch, p.tokens = tokens, p.heads = heads, p.keys = keys, p.kv_heads = kv_heads, p.head_size = size;
    p.scale = 1 / std::sqrt(static_cast<float>(size));
    p.q = q.data(), p.k = k.data(), p.v = v.data(), p.visible = visible.data(), p.dout = dout.data();
    p.dq = result.data(), p.dk = p.dq + queries, p.dv = p.dk + stored;
    attention_gradient(with.attention_gradient, with.matmul, p);
    return result;
  };
  const std::vector<float> got = run(kernels), scalar = run(*find_kernels("scalar")->floats);
  std::vector<double> expected(got.size(), 0.0);
  double* dq = expected.data();
  double *dk = dq + queries, *dv = dk + stored;
  const double scale = 1 / std::sqrt(static_cast<double>(size));
  std::vector<double> p(keys), dp(keys);
  for (int64_t query = 0; query < batch * tokens * heads; ++query) {
    const int64_t token = query / heads, sequence = token / tokens, head = query % heads / (heads / kv_heads);
    const auto at = [&](int64_t key) { return ((sequence * keys + key) * kv_heads + head) * size; };
    double sum = 0, mean = 0, largest = -1e300;
    for (int64_t key = 0; key < keys; ++key) {
      p[key] = dp[key] = 0;
      for (int64_t d = 0; d < size; ++d) {
        p[key] += scale * q[query * size + d] * k[at(key) + d];
        dp[key] += double{dout[query * size + d]} * v[at(key) + d];
      }
      if (visible[token * keys + key]) largest = std::max(largest, p[key]);
    }
    for (int64_t key = 0; key < keys; ++key) {
      p[key] = visible[token * keys + key] ? std::exp(p[key] - largest) : 0;
      sum += p[key];
    }
    if (sum == 0) continue;
    for (int64_t key = 0; key < keys; ++key) mean += (p[key] /= sum) * dp[key];
    for (int64_t key = 0; key < keys; ++key) {
      const double ds = scale * p[key] * (dp[key] - mean);
      for (int64_t d = 0; d < size; ++d) {
        dq[query * size + d] += ds * k[at(key) + d];
        dk[at(key) + d] += ds * q[query * size + d];
        dv[at(key) + d] += p[key] * dout[query * size + d];
      }
    }
  }
  int64_t wrong = differing(got, scalar);
  for (size_t i = 0; i < got.size(); ++i) wrong += !(std::abs(scalar[i] - expected[i]) <= 2e-5 * (1 + std::abs(expected[i])));
  return wrong;
}

int64_t wrong_codes(const MatmulKernels& kernels, Format format, int64_t m, int64_t n, int64_t k) {
  source.seed(7);
  const int32_t fields = highest_field(format) + 1;
  std::vector<int8_t> x(m * k), w(n * k);
  for (int8_t& code : x) code = static_cast<int8_t>(source() % 256);
  for (int8_t& code : w) code = static_cast<int8_t>(static_cast<int32_t>(source() % fields) * multiplier(format) - offset(format));
  const int64_t blocks = divide_up(k, block_inputs(format));
  std::vector<int32_t> y(m * n);
  Problem p = {format, m, n, 1, blocks, nullptr, blocks * block_inputs(format), nullptr, nullptr, y.data()};
  std::vector<uint8_t> packed(p.panels() * p.panel_bytes());
  for (int64_t panel = 0; panel < p.panels(); ++panel) {
    pack_panel(format, w.data() + panel * kPanelRows * k, k, p.panel_rows(panel), k, blocks,
               packed.data() + panel * p.panel_bytes());
  }
  p.w = packed.data();
  Rows rows;
  rows.prepare(x.data(), k, k, kernels, p);
  kernels.matmul(p, 0, p.panels());
  int64_t wrong = 0;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      int32_t sum = 0;
      for (int64_t l = 0; l < k; ++l) sum += x[i * k + l] * w[j * k + l];
      wrong += y[i * n + j] != sum;
    }
  }
  return wrong;
}

}  // namespace

int main() {
  bitnet_kernels_set_thread_count(3);
  // One of everything; odd sizes; several chains of inputs, work items and tiles.
  const int64_t products[][3] = {{1, 1, 1}, {7, 5, 3}, {6, 16, 256}, {100, 70, 300}, {50, 33, 1030}};
  const int64_t gradients[][5] = {{1, 1, 1, 1, 1}, {7, 7, 2, 1, 8}, {65, 130, 3, 3, 20}, {50, 49, 4, 2, 40}};
  int64_t all_wrong = 0;
  std::istringstream names(bitnet_kernels_available_isas());
  for (std::string isa; std::getline(names, isa, ',');) {
    const Kernels& kernels = *find_kernels(isa);
    int64_t wrong = 0, cases = 0;
    for (const auto& [m, n, k] : products) {
      for (int layout = 0; layout < 8; ++layout, ++cases) wrong += wrong_product(kernels.floats->matmul, m, n, k, layout);
    }
    for (const auto& [tokens, keys, heads, kv_heads, size] : gradients) {
      wrong += wrong_gradient(*kernels.floats, tokens, keys, heads, kv_heads, size);
      ++cases;
    }
    for (Format format : kFormats) {
      for (const auto& [m, n, k] : products) {
        wrong += wrong_codes(*kernels.integer, format, m, n, k);
        ++cases;
      }
    }
    std::printf("%s: %d cases, %d wrong\n", isa.c_str(), static_cast<int>(cases), static_cast<int>(wrong));
    all_wrong += wrong;
  }
  return all_wrong != 0;
}
