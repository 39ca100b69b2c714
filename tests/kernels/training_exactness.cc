// The products and the attention gradient of training, on every instruction set of this processor: to the bit those of the
// scalar loops, which are held to plain loops in double; codes packed on the way against plain integer sums. Run by
// itself like float_exactness.cc.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <random>
#include <vector>

#include "attention_gradient.h"
#include "code_panels.h"
#include "float_matmul.h"
#include "float_mode.h"
#include "kernels.h"
#include "packed_product.h"
#include "tally.h"
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

template <typename T>
Operand<T> operand(const std::vector<T>& data, int64_t rows, int64_t k, bool transposed) {
  return transposed ? Operand<T>{data.data(), 1, rows} : Operand<T>{data.data(), k, 1};
}

// The operands of a product; the bits of `layout`: a and b transposed, b of codes.
struct Product {
  int64_t m, n, k;
  int layout;
  std::vector<float> a, b;
  std::vector<int8_t> codes;

  Product(int64_t m, int64_t n, int64_t k, int layout)
      : m(m), n(n), k(k), layout(layout), a(normals(m * k)), b(normals(n * k)), codes(n * k) {
    for (int8_t& code : codes) code = static_cast<int8_t>(source() % 256);
  }
  Operand<float> rows() const { return operand(a, m, k, layout & 1); }
  FloatsOrCodes columns() const {
    if (layout & 4) return {{}, operand(codes, n, k, layout & 2)};
    return {operand(b, n, k, layout & 2), {}};
  }
  std::vector<float> multiply(const Kernels& with) const {
    std::vector<float> c(m * n, -1.0f);
    float_matmul(with.floats->matmul, {m, n, k, rows(), columns(), c.data()});
    return c;
  }
};

void test_product(std::vector<Tally>& tallies, int64_t m, int64_t n, int64_t k, int layout) {
  const Product p(m, n, k, layout);
  const std::vector<float> scalar = p.multiply(*find_kernels("scalar"));
  const FloatsOrCodes columns = p.columns();
  int64_t wrong = 0;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0, size = 0;
      for (int64_t l = 0; l < k; ++l) {
        const double y = columns.codes.data ? *columns.codes.at(j, l) : *columns.floats.at(j, l);
        const double product = y * *p.rows().at(i, l);
        sum += product;
        size += std::abs(product);
      }
      wrong += !(std::abs(scalar[i * n + j] - sum) <= (k + 1) * 0x1p-24 * size);
    }
  }
  compare(tallies, wrong, scalar, [&](const Kernels& with) { return p.multiply(with); });
}

// Zeros of both signs, denormal numbers, numbers whose products overflow, an infinity or NaN every few rows; with denormal
// numbers kept, and flushed as by XLA's threads.
void test_special_product(std::vector<Tally>& tallies, int64_t m, int64_t n, int64_t k, int layout) {
  Product p(m, n, k, layout);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float finite[] = {0.0f, -0.0f, 1e-45f, -1e-39f, 1.1754944e-38f, 3e-20f, 3e38f, -3e38f, 1.5f};
  const float rest[] = {kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN()};
  for (auto* values : {&p.a, &p.b}) {
    for (float& value : *values) value = finite[source() % std::size(finite)];
    for (size_t i = 0; i < values->size(); i += 3 * k + 1) (*values)[i] = rest[source() % std::size(rest)];
  }
#if defined(__x86_64__)
  constexpr uint64_t kFlush = 0x8040;
#else
  constexpr uint64_t kFlush = 1 << 24;
#endif
  for (uint64_t flush : {uint64_t{0}, kFlush}) {
    const FloatMode mode(FloatMode::kIeee | flush);
    const auto run = [&](const Kernels& with) { return p.multiply(with); };
    compare(tallies, 0, run(*find_kernels("scalar")), run);
  }
}

// With a window a token sees itself and those before it, `window` in all: the last keys without the first.
void test_gradient(std::vector<Tally>& tallies, int64_t tokens, int64_t keys, int64_t heads, int64_t kv_heads,
                   int64_t size, int64_t window = 0) {
  const int64_t batch = 2, queries = batch * tokens * heads * size, stored = batch * keys * kv_heads * size;
  const std::vector<float> q = normals(queries), k = normals(stored), v = normals(stored), dout = normals(queries);
  std::vector<uint8_t> visible(batch * tokens * keys);
  for (int64_t i = 0; i < batch * tokens; ++i) {  // causal, full, with holes, nothing
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t back = i % tokens - j;
      if (window > 0) visible[i * keys + j] = back >= 0 && back < window;
      else visible[i * keys + j] = i % 4 == 0 ? j <= i % tokens : i % 4 == 1 ? 1 : i % 4 == 2 ? source() % 3 == 0 : 0;
    }
  }
  const auto run = [&](const Kernels& with) {
    std::vector<float> result(queries + 2 * stored, -1.0f);
    AttentionGradient p{};
    p.batch = batch, p.tokens = tokens, p.heads = heads, p.keys = keys, p.kv_heads = kv_heads, p.head_size = size;
    p.scale = 1 / std::sqrt(static_cast<float>(size));
    p.q = q.data(), p.k = k.data(), p.v = v.data(), p.visible = visible.data(), p.dout = dout.data();
    p.dq = result.data(), p.dk = p.dq + queries, p.dv = p.dk + stored;
    attention_gradient(with.floats->attention_gradient, with.floats->matmul, p);
    return result;
  };
  const std::vector<float> scalar = run(*find_kernels("scalar"));
  std::vector<double> expected(scalar.size(), 0.0);
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
  int64_t wrong = 0;
  for (size_t i = 0; i < scalar.size(); ++i) {
    wrong += !(std::abs(scalar[i] - expected[i]) <= 2e-5 * (1 + std::abs(expected[i])));
  }
  compare(tallies, wrong, scalar, run);
}

void test_codes(std::vector<Tally>& tallies, Format format, int64_t m, int64_t n, int64_t k) {
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
  std::vector<int32_t> expected;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      int32_t sum = 0;
      for (int64_t l = 0; l < k; ++l) sum += x[i * k + l] * w[j * k + l];
      expected.push_back(sum);
    }
  }
  for (Tally& tally : tallies) {
    std::fill(y.begin(), y.end(), -1);
    Rows rows;
    rows.prepare(x.data(), k, k, *tally.kernels.integer, p);
    tally.kernels.integer->matmul(p, 0, p.panels());
    int64_t wrong = 0;
    for (size_t i = 0; i < y.size(); ++i) wrong += y[i] != expected[i];
    tally.add(wrong);
  }
}

}  // namespace

int main() {
  bitnet_kernels_set_thread_count(3);
  // One of everything; odd sizes; several chains of inputs, work items and tiles.
  const int64_t products[][3] = {{1, 1, 1}, {7, 5, 3}, {6, 16, 256}, {100, 70, 300}, {50, 33, 1030}};
  const int64_t gradients[][5] = {{1, 1, 1, 1, 1}, {7, 7, 2, 1, 8}, {65, 130, 3, 3, 20}, {50, 49, 4, 2, 40}};
  std::vector<Tally> tallies = ::tallies();
  for (const auto& [m, n, k] : products) {
    for (int layout = 0; layout < 8; ++layout) {
      test_product(tallies, m, n, k, layout);
      if (k <= 256) test_special_product(tallies, 2 * m + 1, 3 * n + 1, k + 4, layout);
    }
    for (Format format : kFormats) test_codes(tallies, format, m, n, k);
  }
  for (const auto& [tokens, keys, heads, kv_heads, size] : gradients) {
    test_gradient(tallies, tokens, keys, heads, kv_heads, size);
  }
  // Blocks of queries begin at keys that no tile of rows begins at, and end at the last.
  for (int64_t tokens : {64, 96}) test_gradient(tallies, tokens, tokens, 2, 1, 8, 17);
  return report(tallies);
}
