#include "scaled_matmul.h"

#include <algorithm>
#include <vector>

namespace bitnet {
namespace {

constexpr int64_t kScratchSums = 64 << 10;  // int32 sums of a tile: 256 KiB, in L2
constexpr int64_t kRowStep = 12;            // whole register tiles of every instruction set

// One row of x. sums of a group lie sums_step apart, its scales n apart; a factor of 1 changes nothing.
void rescale(const int32_t* sums, const float* scales, int64_t groups, int64_t sums_step, int64_t n, float activation,
             float* y) {
  if (groups == 1) {  // one pass: for a single row of x the time shows
    for (int64_t r = 0; r < n; ++r) y[r] = static_cast<float>(sums[r]) * scales[r] * activation;
    return;
  }
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t r = 0; r < n; ++r) {
      const float product = static_cast<float>(sums[g * sums_step + r]) * scales[g * n + r];
      y[r] = g == 0 ? product : y[r] + product;
    }
  }
  for (int64_t r = 0; r < n; ++r) y[r] *= activation;
}

// The scales of matrix rows [first, first + n) as [groups, n], so that rows are neighbours: in place, or copied to
// `copy` in memory order, because the scales of a head with many groups are megabytes.
const float* neighbouring_scales(const Scales& s, int64_t groups, int64_t first, int64_t n, std::vector<float>& copy) {
  if (s.stride == 1) return s.matrix + first;
  copy.resize(groups * n);
  if (s.stride == 0) {
    std::fill_n(copy.begin(), n, s.matrix[0]);
    return copy.data();
  }
  const float* row = s.matrix + first * groups;
  for (int64_t r = 0; r < n; ++r, row += groups) {
    for (int64_t g = 0; g < groups; ++g) copy[g * n + r] = row[g];
  }
  return copy.data();
}

}  // namespace

void scaled_matmul(const MatmulKernels& kernels, const Problem& p, const Scales& s, float* out, int64_t begin,
                   int64_t end) {
  // The same problem cut down to these panels and, where there are many rows of x, to some of them at a time.
  Problem part = p;
  const int64_t first = begin * kPanelRows;
  part.n = std::min(p.n, end * kPanelRows) - first;
  part.w = p.w + begin * p.panel_bytes();
  const int64_t fitting = kScratchSums / (p.groups * part.n) / kRowStep * kRowStep;
  const int64_t rows = std::min(p.m, std::max(kRowStep, fitting));
  static thread_local std::vector<int32_t> sums;
  static thread_local std::vector<float> copy;
  sums.resize(p.groups * rows * part.n);
  const float* scales = neighbouring_scales(s, p.groups, first, part.n, copy);
  for (int64_t row = 0; row < p.m; row += rows) {
    part.m = std::min(rows, p.m - row);
    part.x = p.x + row * p.x_stride;
    part.x_sums = p.x_sums + row * p.groups;
    part.y = sums.data();
    kernels.matmul(part, 0, part.panels());
    for (int64_t i = 0; i < part.m; ++i) {
      const float activation = s.activation == nullptr ? 1.0f : s.activation[row + i];
      float* y = out + (row + i) * p.n + first;
      rescale(sums.data() + i * part.n, scales, p.groups, part.m * part.n, part.n, activation, y);
    }
  }
}

}  // namespace bitnet
