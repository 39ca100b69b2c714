#include "scaled_matmul.h"

#include <algorithm>
#include <vector>

namespace bitnet {
namespace {

constexpr int64_t kScratchSums = 64 << 10;  // int32 sums of a tile: 256 KiB, in L2
constexpr int64_t kRowStep = 12;            // whole register tiles of every instruction set

// One row of x times one panel. sums of a group lie sums_step apart; scales and minimum are [groups][kPanelRows].
void rescale(const int32_t* sums, int64_t sums_step, const int32_t* x_sums, const float* scales, const float* minimum,
             int64_t groups, int64_t rows, float activation, float* y) {
  float totals[kPanelRows];
  std::fill_n(totals, kPanelRows, -0.0f);  // the identity of addition
  for (int64_t g = 0; g < groups; ++g, sums += sums_step, scales += kPanelRows) {
    for (int64_t r = 0; r < rows; ++r) {
      float term = static_cast<float>(sums[r]) * scales[r];
      if (minimum != nullptr) term += static_cast<float>(x_sums[g]) * minimum[g * kPanelRows + r];
      totals[r] += term;
    }
  }
  for (int64_t r = 0; r < rows; ++r) y[r] = totals[r] * activation;  // a factor of 1 changes nothing
}

// One group: the sums of a row of x are neighbours, and so are their scales.
void rescale_one_group(const int32_t* sums, float x_sum, const float* scales, const float* minimum, int64_t n,
                       float activation, float* y) {
  if (minimum == nullptr) {
    for (int64_t r = 0; r < n; ++r) y[r] = static_cast<float>(sums[r]) * scales[r] * activation;
  } else {
    for (int64_t r = 0; r < n; ++r) y[r] = (static_cast<float>(sums[r]) * scales[r] + x_sum * minimum[r]) * activation;
  }
}

// The scales of the panels of p, whose first row is `first`, as [panels][groups][kPanelRows].
void all_panel_scales(const ScaleMatrix& s, const Problem& p, int64_t first, std::vector<float>& to) {
  to.resize(s.data == nullptr ? 0 : p.panels() * p.groups * kPanelRows);
  if (s.data == nullptr) return;
  for (int64_t panel = 0; panel < p.panels(); ++panel) {
    panel_scales(s, p.groups, first + panel * kPanelRows, p.panel_rows(panel), to.data() + panel * p.groups * kPanelRows);
  }
}

// By way of the integer sums of all groups in memory.
void scale_sums(const MatmulKernels& kernels, const Problem& p, const MatmulScales& s, float* out, int64_t begin, int64_t end) {
  // The same problem cut down to these panels and, where there are many rows of x, to some of them at a time.
  Problem part = p;
  const int64_t first = begin * kPanelRows;
  part.n = std::min(p.n, end * kPanelRows) - first;
  part.w = p.w + begin * p.panel_bytes();
  const int64_t fitting = kScratchSums / (p.groups * part.n) / kRowStep * kRowStep;
  const int64_t rows = std::min(p.m, std::max(kRowStep, fitting));
  static thread_local std::vector<int32_t> sums;
  static thread_local std::vector<float> scale_copy, minimum_copy;
  sums.resize(p.groups * rows * part.n);
  all_panel_scales(s.minimum, part, first, minimum_copy);
  const float* minimum = s.minimum.data == nullptr ? nullptr : minimum_copy.data();
  const float* scales;
  if (p.groups == 1 && s.matrix.stride == 1 && !s.matrix.half) {
    scales = static_cast<const float*>(s.matrix.data) + first;
  } else {
    all_panel_scales(s.matrix, part, first, scale_copy);
    scales = scale_copy.data();
  }
  for (int64_t row = 0; row < p.m; row += rows) {
    part.m = std::min(rows, p.m - row);
    part.x = p.x + row * p.x_stride;
    part.x_sums = p.x_sums + row * p.groups;
    part.y = sums.data();
    kernels.matmul(part, 0, part.panels());
    for (int64_t i = 0; i < part.m; ++i) {
      const float activation = s.activation == nullptr ? 1.0f : s.activation[row + i];
      const int32_t* x_sums = part.x_sums + i * p.groups;
      const int32_t* y_sums = sums.data() + i * part.n;
      float* y = out + (row + i) * p.n + first;
      if (p.groups == 1) {
        rescale_one_group(y_sums, static_cast<float>(x_sums[0]), scales, minimum, part.n, activation, y);
        continue;
      }
      for (int64_t panel = 0; panel < part.panels(); ++panel) {
        const int64_t at = panel * kPanelRows, scale = at * p.groups;
        rescale(y_sums + at, part.m * part.n, x_sums, scales + scale, minimum == nullptr ? nullptr : minimum + scale,
                p.groups, part.panel_rows(panel), activation, y + at);
      }
    }
  }
}

}  // namespace

void scaled_matmul(const MatmulKernels& kernels, const Problem& p, const MatmulScales& s, float* out, int64_t begin,
                   int64_t end) {
  const bool tables = kernels.table_rows != nullptr && kernels.table_rows(p) > 0;
  if (p.groups == 1 || kernels.scaled == nullptr || tables || p.group_inputs() > kTileInputs) {
    return scale_sums(kernels, p, s, out, begin, end);
  }
  static thread_local std::vector<float> scratch;
  scratch.resize(kMaxTilePanels * p.groups * kPanelRows * (has_minimum(p.format) ? 2 : 1));
  kernels.scaled(p, s, out, begin, end, scratch.data());
}

}  // namespace bitnet
