#include "head_exact.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "float_mode.h"
#include "threads.h"

namespace bitnet {
namespace {

constexpr int64_t kRowsAtOnce = 4096;  // rows of the table in a work item
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kUp = 1 + 1e-9;  // more than the roundings of a double sum of kMaxExactInputs terms

struct Interval {
  double lower, upper;
};

// What one row of x contributes to a and e.
struct InputBounds {
  double scale;   // step / 254
  double size;    // |x|
  double error;   // the factor of |t - w|
  double weight;  // the factor of |w|
  double tiny;
};

InputBounds input_bounds(const ExactProblem& p, int64_t row) {
  const int64_t k = p.head.k;
  const float* x = p.head.inputs(row);
  const int8_t* high = p.digits + row * k;
  const int8_t* low = high + p.head.m * k;
  const double scale = static_cast<double>(p.x_scale[row]) / 254;
  double square = 0, lost_square = 0;
  for (int64_t c = 0; c < k; ++c) {
    const double lost = x[c] - scale * (254 * high[c] + low[c]);
    square += static_cast<double>(x[c]) * x[c];
    lost_square += lost * lost;
  }
  const double size = std::sqrt(square) * kUp, lost = std::sqrt(lost_square) * kUp;
  const double roundings = ((k + kHeadLanes - 1) / kHeadLanes + 4) * 0x1p-24;
  const double g = roundings / (1 - roundings);
  return {scale, size, size * (1 + g) * kUp, (lost + size * (g + 1e-12)) * kUp, (k + 32) * 0x1p-149};
}

Interval interval(const ExactProblem& p, const InputBounds& x, int64_t x_row, int64_t row) {
  const int32_t* high = p.sums + x_row * p.head.n;
  const int32_t* low = high + p.head.m * p.head.n;
  const double error = p.norms[row], weight = p.norms[p.head.n + row];
  const double sum = 254 * static_cast<double>(high[row]) + low[row];
  const double a = sum * (x.scale * p.w_scale[row]);
  const double e = x.error * error + x.weight * weight + x.tiny;
  // Written so that NaN fails.
  const bool bounded = x.size * (error + weight) < 0x1p127 && e < kInfinity && std::abs(a) < kInfinity;
  return bounded ? Interval{a - e, a + e} : Interval{-kInfinity, kInfinity};
}

// Leaves the `top` largest values, the least of them last.
void keep_largest(std::vector<double>& values, int64_t top) {
  if (static_cast<int64_t>(values.size()) < top) return;
  std::nth_element(values.begin(), values.begin() + (top - 1), values.end(), std::greater<>());
  values.resize(top);
}

}  // namespace

void exact_top_logits(const ExactProblem& p, HeadRows head_rows, int32_t* candidates) {
  const int64_t m = p.head.m, n = p.head.n, top = std::min(p.top, n);
  const int64_t pieces = (n + kRowsAtOnce - 1) / kRowsAtOnce;
  std::vector<InputBounds> inputs(m);
  std::vector<std::vector<double>> lowers(m * pieces);
  std::vector<double> thresholds(m);
  std::vector<std::atomic<int32_t>> counts(m);

  const auto for_pieces = [&](const auto& body) {
    parallel_for(m * pieces, [&](int64_t item) {
      const FloatMode ieee(FloatMode::kIeee);
      const int64_t begin = item % pieces * kRowsAtOnce;
      body(item, item / pieces, begin, std::min(n, begin + kRowsAtOnce));
    });
  };
  {
    const FloatMode ieee(FloatMode::kIeee);
    for (int64_t i = 0; i < m; ++i) inputs[i] = input_bounds(p, i);
  }
  for_pieces([&](int64_t item, int64_t i, int64_t begin, int64_t end) {
    std::vector<double>& values = lowers[item];
    values.resize(end - begin);
    for (int64_t row = begin; row < end; ++row) values[row - begin] = interval(p, inputs[i], i, row).lower;
    keep_largest(values, top);
  });
  for (int64_t i = 0; i < m; ++i) {
    std::vector<double> all;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const std::vector<double>& kept = lowers[i * pieces + piece];
      all.insert(all.end(), kept.begin(), kept.end());
    }
    keep_largest(all, top);
    thresholds[i] = all.back();
  }
  for_pieces([&](int64_t, int64_t i, int64_t begin, int64_t end) {
    HeadProblem one = p.head;
    one.m = 1;
    one.x = p.head.inputs(i);
    one.y = p.head.output(i, 0);
    int64_t found = 0;
    for (int64_t row = begin; row < end;) {
      int64_t run = row;  // candidates are often neighbours
      while (run < end && interval(p, inputs[i], i, run).upper >= thresholds[i]) ++run;
      if (run > row) head_rows(one, row, run);
      found += run - row;
      if (run < end) one.y[run] = -std::numeric_limits<float>::infinity();
      row = run + 1;
    }
    counts[i] += static_cast<int32_t>(found);
  });
  for (int64_t i = 0; i < m; ++i) candidates[i] = counts[i];
}

}  // namespace bitnet
