// Attention and output heads of every instruction set of this processor, to the bit those of the scalar loops, which
// are held to plain loops in double; on buffers of exactly the right size and on several threads. Run by itself, under
// the sanitizers (test_sanitizers.py) and in emulated processors (test_emulated.py). Prints a line for each instruction
// set; the exit status tells whether all outputs were right.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "attention.h"
#include "float_mode.h"
#include "head.h"
#include "head_exact.h"
#include "kernels.h"
#include "tally.h"
#include "threads.h"

using namespace bitnet;

namespace {

std::mt19937 source(1);

float normal() { return std::normal_distribution<float>()(source); }

uint16_t bfloat16(float x) {  // the high half: rounding does not matter here
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(bits >> 16);
}

float widened(uint16_t x) {
  const uint32_t bits = uint32_t{x} << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

// A cache whose keys and values behind `length` are NaN (int8: large), for nothing may look at them.
struct Cache {
  AttentionProblem p;
  std::vector<float> q, k_scale, v_scale, k_floats, v_floats;  // the last two: what is stored, as floats
  std::vector<uint16_t> k_halves, v_halves;
  std::vector<int8_t> k_codes, v_codes;
  std::vector<uint8_t> visible;
};

struct Sizes {
  int64_t batch, tokens, heads, kv_heads, head_size, room, length;
};

Cache make_cache(const Sizes& s, KvType type) {
  Cache c;
  const int64_t stored = s.batch * s.room * s.kv_heads * s.head_size, scales = s.batch * s.room * s.kv_heads;
  c.q.resize(s.batch * s.tokens * s.heads * s.head_size);
  for (float& x : c.q) x = normal();
  for (auto* floats : {&c.k_floats, &c.v_floats}) {
    floats->resize(stored);
    for (float& x : *floats) x = normal();
  }
  const auto written = [&](int64_t i) { return i / (s.kv_heads * s.head_size) % s.room < s.length; };
  const float nothing = std::numeric_limits<float>::quiet_NaN();
  if (type == KvType::kInt8) {
    const auto encode = [&](std::vector<float>& floats, std::vector<int8_t>& codes, std::vector<float>& scale) {
      scale.resize(scales);
      codes.resize(stored);
      for (float& x : scale) x = 0.01f + 0.01f * std::abs(normal());
      for (int64_t i = 0; i < stored; ++i) {
        codes[i] = static_cast<int8_t>(static_cast<int64_t>(source() % 255) - 127);
        floats[i] = codes[i] * scale[i / s.head_size];
        if (!written(i)) scale[i / s.head_size] = nothing;
      }
    };
    encode(c.k_floats, c.k_codes, c.k_scale);
    encode(c.v_floats, c.v_codes, c.v_scale);
  } else if (type == KvType::kBfloat16) {
    const auto encode = [&](std::vector<float>& floats, std::vector<uint16_t>& halves) {
      halves.resize(stored);
      for (int64_t i = 0; i < stored; ++i) {
        halves[i] = bfloat16(written(i) ? floats[i] : nothing);
        floats[i] = widened(halves[i]);
      }
    };
    encode(c.k_floats, c.k_halves);
    encode(c.v_floats, c.v_halves);
  } else {
    for (auto* floats : {&c.k_floats, &c.v_floats}) {
      for (int64_t i = 0; i < stored; ++i) {
        if (!written(i)) (*floats)[i] = nothing;
      }
    }
  }
  c.visible.resize(s.batch * s.tokens * s.room);
  for (int64_t query = 0; query < s.batch * s.tokens; ++query) {
    const uint32_t percent = query % 4 == 3 ? 0 : query % 4 == 2 ? 100 : 5 + 50 * (query % 4);
    for (int64_t i = 0; i < s.room; ++i) c.visible[query * s.room + i] = source() % 100 < percent;
  }
  const bool codes = type == KvType::kInt8, halves = type == KvType::kBfloat16;
  const void* k = codes ? static_cast<void*>(c.k_codes.data()) : halves ? static_cast<void*>(c.k_halves.data()) : c.k_floats.data();
  const void* v = codes ? static_cast<void*>(c.v_codes.data()) : halves ? static_cast<void*>(c.v_halves.data()) : c.v_floats.data();
  c.p = {s.batch, s.tokens, s.heads, s.kv_heads, s.head_size, s.room, s.length,
         1 / std::sqrt(static_cast<float>(s.head_size)), type, c.q.data(), k, v,
         codes ? c.k_scale.data() : nullptr, codes ? c.v_scale.data() : nullptr, c.visible.data(), nullptr};
  return c;
}

std::vector<float> attend(const AttentionKernels& kernels, Cache& c) {
  std::vector<float> out(c.q.size(), -1.0f);
  c.p.out = out.data();
  attend(kernels, c.p);
  return out;
}

// Outputs that are further from the definition than float32 rounding of at most 300 terms.
int64_t far_outputs(const Cache& c, const std::vector<float>& out) {
  const AttentionProblem& p = c.p;
  int64_t wrong = 0;
  std::vector<double> weights(p.length), mix(p.head_size);
  for (int64_t query = 0; query < p.batch * p.tokens * p.heads; ++query) {
    const int64_t token = query / p.heads, sequence = token / p.tokens, head = query % p.heads / p.group();
    const auto at = [&](int64_t key) { return ((sequence * p.room + key) * p.kv_heads + head) * p.head_size; };
    double largest = -1e300, sum = 0;
    for (int64_t key = 0; key < p.length; ++key) {
      double score = 0;
      for (int64_t d = 0; d < p.head_size; ++d) score += double{c.q[query * p.head_size + d]} * c.k_floats[at(key) + d];
      weights[key] = score * p.scale;
      if (p.visible[token * p.room + key]) largest = std::max(largest, weights[key]);
    }
    std::fill(mix.begin(), mix.end(), 0.0);
    for (int64_t key = 0; key < p.length; ++key) {
      if (!p.visible[token * p.room + key]) continue;
      const double weight = std::exp(weights[key] - largest);
      sum += weight;
      for (int64_t d = 0; d < p.head_size; ++d) mix[d] += weight * c.v_floats[at(key) + d];
    }
    for (int64_t d = 0; d < p.head_size; ++d) {
      const double expected = sum > 0 ? mix[d] / sum : 0;
      wrong += !(std::abs(out[query * p.head_size + d] - expected) <= 2e-5 * (1 + std::abs(expected)));
    }
  }
  return wrong;
}

void test_attention(std::vector<Tally>& tallies, const Sizes& sizes, KvType type) {
  Cache c = make_cache(sizes, type);
  const auto run = [&](const Kernels& with) { return attend(with.floats->attention, c); };
  const std::vector<float> scalar = run(*find_kernels("scalar"));
  compare(tallies, far_outputs(c, scalar), scalar, run);
}

// Scores that overflow, infinite values, a key and a query with NaN.
void test_special_attention(std::vector<Tally>& tallies, const Sizes& sizes) {
  Cache c = make_cache(sizes, KvType::kFloat32);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float specials[] = {0.0f, -0.0f, 1e-45f, -1e-39f, 1e25f, -1e25f, 3e38f};
  for (auto* values : {&c.q, &c.k_floats, &c.v_floats}) {
    for (size_t i = 0; i < values->size(); i += 1 + source() % 40) (*values)[i] = specials[source() % std::size(specials)];
  }
  for (size_t i = 0; i < c.v_floats.size(); i += 97) c.v_floats[i] = i % 2 ? kInfinity : -kInfinity;
  c.k_floats[c.k_floats.size() / 2] = c.q[c.q.size() / 3] = std::numeric_limits<float>::quiet_NaN();
  const auto run = [&](const Kernels& with) { return attend(with.floats->attention, c); };
  compare(tallies, 0, run(*find_kernels("scalar")), run);
}

struct Head {
  int64_t m, n, k;
  std::vector<float> x;
  std::vector<uint16_t> table;

  Head(int64_t m, int64_t n, int64_t k) : m(m), n(n), k(k), x(m * k), table(n * k) {
    for (float& value : x) value = normal();
    for (uint16_t& value : table) value = bfloat16(normal());
  }
  std::vector<float> logits(HeadRows rows) const {
    std::vector<float> y(m * n);
    const HeadProblem p = {m, n, k, x.data(), table.data(), y.data()};
    const int64_t grain = 16;
    parallel_for((n + grain - 1) / grain, [&](int64_t item) {
      const FloatMode ieee(FloatMode::kIeee);
      rows(p, item * grain, std::min(n, (item + 1) * grain));
    });
    return y;
  }
};

// Logits beyond the bound of bitnet_kernels/head.py from a sum in double.
int64_t far_logits(const Head& head, const std::vector<float>& y) {
  int64_t wrong = 0;
  for (int64_t i = 0; i < head.m; ++i) {
    for (int64_t row = 0; row < head.n; ++row) {
      double sum = 0, size = 0;
      for (int64_t c = 0; c < head.k; ++c) {
        const double product = double{head.x[i * head.k + c]} * widened(head.table[row * head.k + c]);
        sum += product;
        size += std::abs(product);
      }
      wrong += !(std::abs(y[i * head.n + row] - sum) <= (head.k / 16.0 + 4) * 0x1p-24 * size);
    }
  }
  return wrong;
}

// The `top` largest logits by way of an int8 copy: those of `whole`, none of them missing.
int64_t wrong_largest(const Head& head, HeadRows rows, const std::vector<float>& whole, int64_t top) {
  const int64_t m = head.m, n = head.n, k = head.k;
  std::vector<int8_t> digits(2 * m * k), codes(n * k);
  std::vector<float> step(m), scale(n), norms(2 * n), y(m * n);
  std::vector<int32_t> sums(2 * m * n), candidates(m);
  for (int64_t i = 0; i < m; ++i) {
    float largest = 1e-30f;
    for (int64_t c = 0; c < k; ++c) largest = std::max(largest, std::abs(head.x[i * k + c]));
    step[i] = largest / 127;
    for (int64_t c = 0; c < k; ++c) {
      const float steps = head.x[i * k + c] / step[i], high = std::nearbyint(steps);
      digits[i * k + c] = static_cast<int8_t>(high);
      digits[(m + i) * k + c] = static_cast<int8_t>(std::nearbyint((steps - high) * 254));
    }
  }
  for (int64_t row = 0; row < n; ++row) {
    float largest = 1e-30f;
    for (int64_t c = 0; c < k; ++c) largest = std::max(largest, std::abs(widened(head.table[row * k + c])));
    scale[row] = largest / 127;
    double error = 0, weight = 0;
    for (int64_t c = 0; c < k; ++c) {
      const float value = widened(head.table[row * k + c]);
      codes[row * k + c] = static_cast<int8_t>(std::nearbyint(value / scale[row]));
      const double copy = double{scale[row]} * codes[row * k + c];
      error += (value - copy) * (value - copy);
      weight += copy * copy;
    }
    norms[row] = static_cast<float>(std::sqrt(error) * 1.0001 + 1e-30);  // at least the norms
    norms[n + row] = static_cast<float>(std::sqrt(weight) * 1.0001 + 1e-30);
  }
  for (int64_t i = 0; i < 2 * m; ++i) {
    for (int64_t row = 0; row < n; ++row) {
      for (int64_t c = 0; c < k; ++c) sums[i * n + row] += digits[i * k + c] * codes[row * k + c];
    }
  }
  const ExactProblem p = {{m, n, k, head.x.data(), head.table.data(), y.data()},
                          digits.data(), step.data(), sums.data(), scale.data(), norms.data(), top};
  exact_top_logits(p, rows, candidates.data());
  int64_t wrong = 0;
  for (int64_t i = 0; i < m; ++i) {
    std::vector<float> sorted(whole.begin() + i * n, whole.begin() + (i + 1) * n);
    std::sort(sorted.rbegin(), sorted.rend());
    const float smallest = sorted[std::min(top, n) - 1];
    int64_t known = 0;
    for (int64_t row = 0; row < n; ++row) {
      const float got = y[i * n + row], logit = whole[i * n + row];
      if (std::isinf(got)) {
        wrong += logit >= smallest;
      } else {
        ++known;
        wrong += got != logit;
      }
    }
    wrong += known != candidates[i];
    wrong += n > 1000 && known > n / 2;  // finding every row a candidate would prove nothing
  }
  return wrong;
}

void test_head(std::vector<Tally>& tallies, int64_t m, int64_t n, int64_t k) {
  const Head head(m, n, k);
  const std::vector<float> scalar = head.logits(find_kernels("scalar")->floats->head_rows);
  const int64_t wrong = far_logits(head, scalar);
  for (Tally& tally : tallies) {
    const HeadRows rows = tally.kernels.floats->head_rows;
    tally.add(wrong + differing(head.logits(rows), scalar) + wrong_largest(head, rows, scalar, 3));
  }
}

void test_special_head(std::vector<Tally>& tallies, int64_t m, int64_t n, int64_t k) {
  Head head(m, n, k);
  const float specials[] = {0.0f, -0.0f, 1e-45f, -1e-39f, 3e38f, -3e38f, std::numeric_limits<float>::infinity()};
  for (size_t i = 0; i < head.x.size(); i += 1 + source() % 7) head.x[i] = specials[source() % std::size(specials)];
  for (uint16_t& value : head.table) value = static_cast<uint16_t>(source());  // also NaN
  const auto run = [&](const Kernels& with) { return head.logits(with.floats->head_rows); };
  compare(tallies, 0, run(*find_kernels("scalar")), run);
}

// Every float16 there is.
void test_widening(std::vector<Tally>& tallies) {
  std::vector<uint16_t> halves(1 << 16);
  std::iota(halves.begin(), halves.end(), uint16_t{0});
  std::vector<float> scalar(halves.size()), floats(halves.size());
  widen_scalar(halves.data(), scalar.size(), scalar.data());
  for (Tally& tally : tallies) {
    tally.kernels.widen(halves.data(), floats.size(), floats.data());
    tally.add(differing(floats, scalar));
  }
}

}  // namespace

int main() {
  bitnet_kernels_set_thread_count(3);
  // One of everything; groups of heads and odd sizes; one query and chunks of keys; blocks of rows; nothing written.
  const Sizes caches[] = {{1, 1, 1, 1, 1, 1, 1},       {2, 5, 6, 3, 20, 150, 149}, {1, 1, 4, 1, 128, 300, 280},
                          {1, 70, 4, 2, 24, 130, 130}, {3, 9, 2, 2, 64, 140, 139}, {1, 2, 2, 2, 16, 20, 0}};
  // Less than a vector, ends of vectors, fewer rows than streams, more rows of x than a tile, several pieces of rows.
  const int64_t heads[][3] = {{1, 1, 1}, {2, 3, 15}, {1, 37, 16}, {7, 70, 33}, {26, 50, 100}, {1, 5000, 48}};
  std::vector<Tally> tallies = ::tallies();
  for (const Sizes& sizes : caches) {
    for (KvType type : {KvType::kFloat32, KvType::kBfloat16, KvType::kInt8}) test_attention(tallies, sizes, type);
  }
  test_special_attention(tallies, {2, 9, 4, 2, 20, 150, 149});
  for (const auto& [m, n, k] : heads) test_head(tallies, m, n, k);
  test_special_head(tallies, 7, 70, 33);
  test_widening(tallies);
  for (Tally& tally : tallies) {  // the loops of the benchmark run at all
    if (tally.kernels.floats->peak) tally.add(tally.kernels.floats->peak(1) <= 0);
    if (tally.kernels.dot_peak) tally.add(tally.kernels.dot_peak(1) <= 0);
  }
  return report(tallies);
}
