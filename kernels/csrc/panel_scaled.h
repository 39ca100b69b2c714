// Products with scale groups of an instruction set: few rows of x, many rows of x (panel_matmul.h).
//
// A group is as short as 32 inputs, four blocks of four bits: its sums never leave the registers. They are turned into
// floats, scaled and added to totals that stay in registers over all groups of a panel (few rows) or of a tile (many).
//
// In addition to what panel_matmul.h lists, an instruction set has
//
//   Floats                  a vector of float32, with as many lanes as Sums
//   to_floats               Sums, rounded to nearest
//   load_floats, splat_float, multiply, add_floats, store_floats    on Floats; a product and a sum are rounded each

#ifndef BITNET_KERNELS_PANEL_SCALED_H_
#define BITNET_KERNELS_PANEL_SCALED_H_

#include "panel_matmul.h"
#include "scaled_matmul.h"

namespace bitnet {
namespace {

// Floats for each group and row of a panel: its scale and, behind all scales, its minimum.
template <Format kFormat>
constexpr int64_t kScaleKinds = has_minimum(kFormat) ? 2 : 1;

// Writes the scales of a panel to scratch, [kinds][groups][rows].
template <Format kFormat>
void load_scales(const Problem& p, const MatmulScales& s, int64_t panel, float* scratch) {
  const int64_t first = panel * kPanelRows, rows = p.panel_rows(panel);
  panel_scales(s.matrix, p.groups, first, rows, scratch);
  if constexpr (has_minimum(kFormat)) panel_scales(s.minimum, p.groups, first, rows, scratch + p.groups * kPanelRows);
}

// Fetches the scales of a panel into cache: their lines are as far apart as panels that are walked in step.
void fetch_scales(const Problem& p, const ScaleMatrix& scales, int64_t panel) {
  if (scales.stride == 0 || panel >= p.panels()) return;
  const int64_t row_bytes = scales.stride * (scales.half ? sizeof(uint16_t) : sizeof(float));
  const char* from = static_cast<const char*>(scales.data) + panel * kPanelRows * row_bytes;
  for (int64_t at = 0; at < p.panel_rows(panel) * row_bytes; at += 64) __builtin_prefetch(from + at);
}

// Adds a group to the totals of one row of x and one panel; scales: of this group.
template <typename Isa, Format kFormat>
BITNET_INLINE void add_group(const Problem& p, int64_t row, int64_t g, const typename Isa::Sums* sums,
                             const float* scales, typename Isa::Floats* totals) {
  const int32_t x_sum = p.x_sum(row, g);
  unrolled<kPanelRows / Isa::kLanes>([&](auto v) BITNET_INLINE_BODY {
    auto sum = multiplier(kFormat) == 2 ? Isa::add(sums[v], sums[v]) : sums[v];
    if constexpr (Isa::offset(kFormat) != 0) sum = Isa::add(sum, Isa::fill(-Isa::offset(kFormat) * x_sum));
    auto term = Isa::multiply(Isa::to_floats(sum), Isa::load_floats(scales + v * Isa::kLanes));
    if constexpr (has_minimum(kFormat)) {
      const auto minimum = Isa::load_floats(scales + p.groups * kPanelRows + v * Isa::kLanes);
      term = Isa::add_floats(term, Isa::multiply(Isa::to_floats(Isa::fill(x_sum)), minimum));
    }
    totals[v] = Isa::add_floats(totals[v], term);
  });
}

// Stores the totals of one row of x and one panel, times a factor.
template <typename Isa>
BITNET_INLINE void store_totals(const Problem& p, int64_t row, int64_t panel, float factor,
                                const typename Isa::Floats* totals, float* out) {
  float* y = out + row * p.n + panel * kPanelRows;
  float edge[kPanelRows];
  const int64_t rows = p.panel_rows(panel);
  float* target = rows == kPanelRows ? y : edge;
  unrolled<kPanelRows / Isa::kLanes>([&](auto v) BITNET_INLINE_BODY {
    Isa::store_floats(target + v * Isa::kLanes, Isa::multiply(totals[v], Isa::splat_float(factor)));
  });
  if (rows < kPanelRows) std::memcpy(y, edge, rows * sizeof(float));
}

BITNET_INLINE float activation_scale(const MatmulScales& s, int64_t row) {
  return s.activation == nullptr ? 1.0f : s.activation[row];
}

// kRows rows of x times kPanels panels, panel_step apart and walked in step; scales: of each of these panels.
template <typename Isa, Format kFormat, int kRows, int kPanels>
void multiply_packed_scaled(const Problem& p, const MatmulScales& s, int64_t row, int64_t panel, int64_t panel_step,
                            const float* scales, float* out) {
  constexpr int kPanelVectors = kPanelRows / Isa::kLanes, kVectors = kPanels * kPanelVectors;
  const int64_t panel_floats = kScaleKinds<kFormat> * p.groups * kPanelRows;
  typename Isa::Floats totals[kRows][kVectors];
  // -0.0 is the identity of addition: +0.0 would change a first term of -0.0.
  unrolled<kRows * kVectors>([&](auto i) BITNET_INLINE_BODY {
    totals[i / kVectors][i % kVectors] = Isa::splat_float(-0.0f);
  });
  for (int64_t g = 0; g < p.groups; ++g) {
    typename Isa::Sums sums[kRows][kVectors];
    packed_sums<Isa, kFormat, kRows, kPanels>(p.block(panel, g, 0), panel_step * p.panel_bytes(), p.ahead,
                                              p.inputs(row, g, 0), p.x_stride, p.group_blocks, sums);
    unrolled<kRows * kPanels>([&](auto i) BITNET_INLINE_BODY {
      constexpr int t = i / kPanels, j = i % kPanels;
      add_group<Isa, kFormat>(p, row + t, g, sums[t] + j * kPanelVectors, scales + j * panel_floats + g * kPanelRows,
                              totals[t] + j * kPanelVectors);
    });
  }
  unrolled<kRows * kPanels>([&](auto i) BITNET_INLINE_BODY {
    constexpr int t = i / kPanels, j = i % kPanels;
    const float factor = activation_scale(s, row + t);
    store_totals<Isa>(p, row + t, panel + j * panel_step, factor, totals[t] + j * kPanelVectors, out);
  });
}

template <typename Isa, Format kFormat, int kPanels, int kRows = Isa::kFusedRows>
void multiply_packed_scaled_rows(const Problem& p, const MatmulScales& s, int64_t row, int64_t panel,
                                 int64_t panel_step, const float* scales, float* out) {
  if constexpr (kRows > 0) {
    for (; row + kRows <= p.m; row += kRows) {
      multiply_packed_scaled<Isa, kFormat, kRows, kPanels>(p, s, row, panel, panel_step, scales, out);
    }
    multiply_packed_scaled_rows<Isa, kFormat, kPanels, kRows - 1>(p, s, row, panel, panel_step, scales, out);
  }
}

// Few rows of x: the panels are cut into kStreams runs walked in step, as in few_rows.
template <typename Isa, Format kFormat>
void few_rows_scaled(const Problem& p, const MatmulScales& s, float* out, int64_t begin, int64_t end, float* scratch) {
  const int64_t run = (end - begin) / Isa::kStreams, rest = begin + run * Isa::kStreams;
  const int64_t panel_floats = kScaleKinds<kFormat> * p.groups * kPanelRows;
  for (int64_t i = 0; i < run; ++i) {
    for (int64_t j = 0; j < Isa::kStreams; ++j) {
      load_scales<kFormat>(p, s, begin + i + j * run, scratch + j * panel_floats);
      fetch_scales(p, s.matrix, begin + i + 1 + j * run);
      if constexpr (has_minimum(kFormat)) fetch_scales(p, s.minimum, begin + i + 1 + j * run);
    }
    multiply_packed_scaled_rows<Isa, kFormat, Isa::kStreams>(p, s, 0, begin + i, run, scratch, out);
  }
  for (int64_t panel = rest; panel < end; ++panel) {
    load_scales<kFormat>(p, s, panel, scratch);
    multiply_packed_scaled_rows<Isa, kFormat, 1, 1>(p, s, 0, panel, 0, scratch, out);
  }
}

// kRows rows of x times groups [begin, end) of an unpacked tile, added to out unless they are the first.
template <typename Isa, Format kFormat, int kRows>
void multiply_unpacked_scaled(const Problem& p, const MatmulScales& s, int64_t row, int64_t panel, int64_t panels,
                              int64_t begin, int64_t end, const typename Isa::Bytes* unpacked, const float* scales,
                              float* out) {
  constexpr int kPanelVectors = kPanelRows / Isa::kLanes, kVectors = Isa::kTilePanels * kPanelVectors;
  const int64_t panel_floats = kScaleKinds<kFormat> * p.groups * kPanelRows;
  const int64_t steps = p.group_blocks * fields(kFormat);
  typename Isa::Floats totals[kRows][kVectors];
  unrolled<kRows * kVectors>([&](auto i) BITNET_INLINE_BODY {
    totals[i / kVectors][i % kVectors] = Isa::splat_float(-0.0f);
  });
  if (begin > 0) {
    for (int64_t j = 0; j < panels; ++j) {
      unrolled<kRows>([&](auto t) BITNET_INLINE_BODY {
        float before[kPanelRows] = {};
        const float* y = out + (row + t) * p.n + (panel + j) * kPanelRows;
        std::memcpy(before, y, p.panel_rows(panel + j) * sizeof(float));
        unrolled<kPanelVectors>([&](auto v) BITNET_INLINE_BODY {
          totals[t][j * kPanelVectors + v] = Isa::load_floats(before + v * Isa::kLanes);
        });
      });
    }
  }
  for (int64_t g = begin; g < end; ++g, unpacked += steps * kVectors) {
    typename Isa::Sums sums[kRows][kVectors];
    unpacked_sums<Isa, kFormat, kRows>(unpacked, p.inputs(row, g, 0), p.x_stride, steps, sums);
    unrolled<kRows * Isa::kTilePanels>([&](auto i) BITNET_INLINE_BODY {
      constexpr int t = i / Isa::kTilePanels, j = i % Isa::kTilePanels;
      add_group<Isa, kFormat>(p, row + t, g, sums[t] + j * kPanelVectors, scales + j * panel_floats + g * kPanelRows,
                              totals[t] + j * kPanelVectors);
    });
  }
  unrolled<kRows>([&](auto t) BITNET_INLINE_BODY {
    const float factor = end < p.groups ? 1.0f : activation_scale(s, row + t);
    unrolled<Isa::kTilePanels>([&](auto j) BITNET_INLINE_BODY {
      if (j < panels) store_totals<Isa>(p, row + t, panel + j, factor, totals[t] + j * kPanelVectors, out);
    });
  });
}

// Sums and totals take a register each, so that half as many rows fit as in multiply_unpacked_rows.
template <typename Isa, Format kFormat, int kRows = Isa::kTileRows / 2>
void multiply_unpacked_scaled_rows(const Problem& p, const MatmulScales& s, int64_t row, int64_t panel, int64_t panels,
                                   int64_t begin, int64_t end, const typename Isa::Bytes* unpacked, const float* scales,
                                   float* out) {
  if constexpr (kRows > 0) {
    for (; row + kRows <= p.m; row += kRows) {
      multiply_unpacked_scaled<Isa, kFormat, kRows>(p, s, row, panel, panels, begin, end, unpacked, scales, out);
    }
    multiply_unpacked_scaled_rows<Isa, kFormat, kRows - 1>(p, s, row, panel, panels, begin, end, unpacked, scales, out);
  }
}

// Many rows of x: the groups that fit a tile of the matrix are unpacked once for all of them.
template <typename Isa, Format kFormat>
void many_rows_scaled(const Problem& p, const MatmulScales& s, float* out, int64_t begin, int64_t end, float* scratch) {
  static_assert(Isa::kTilePanels <= kMaxTilePanels && Isa::kStreams <= kMaxStreams, "scratch has their scales");
  constexpr int64_t kTileBlocks = kTileInputs / block_inputs(kFormat);
  constexpr int kVectors = Isa::kTilePanels * kPanelRows / Isa::kLanes;
  typename Isa::Bytes unpacked[kTileBlocks * fields(kFormat) * kVectors];
  const int64_t panel_floats = kScaleKinds<kFormat> * p.groups * kPanelRows, tile_groups = kTileBlocks / p.group_blocks;
  for (int64_t panel = begin; panel < end; panel += Isa::kTilePanels) {
    const int64_t panels = std::min<int64_t>(Isa::kTilePanels, end - panel);
    if (panels < Isa::kTilePanels) {  // absent panels are multiplied too
      std::memset(unpacked, 0, sizeof(unpacked));
      std::memset(scratch, 0, Isa::kTilePanels * panel_floats * sizeof(float));
    }
    for (int64_t j = 0; j < panels; ++j) load_scales<kFormat>(p, s, panel + j, scratch + j * panel_floats);
    for (int64_t g = 0; g < p.groups; g += tile_groups) {
      const int64_t until = std::min(p.groups, g + tile_groups);
      unpack<Isa, kFormat>(p, panel, panels, g, 0, (until - g) * p.group_blocks, unpacked);
      multiply_unpacked_scaled_rows<Isa, kFormat>(p, s, 0, panel, panels, g, until, unpacked, scratch, out);
    }
  }
}

template <typename Isa, Format kFormat>
void scaled_format(const Problem& p, const MatmulScales& s, float* out, int64_t begin, int64_t end, float* scratch) {
  p.m <= Isa::few_rows(kFormat) ? few_rows_scaled<Isa, kFormat>(p, s, out, begin, end, scratch)
                             : many_rows_scaled<Isa, kFormat>(p, s, out, begin, end, scratch);
}

template <typename Isa>
void scaled(const Problem& p, const MatmulScales& s, float* out, int64_t begin, int64_t end, float* scratch) {
  switch (p.format) {
    case Format::kBinary: return scaled_format<Isa, Format::kBinary>(p, s, out, begin, end, scratch);
    case Format::kTernary2: return scaled_format<Isa, Format::kTernary2>(p, s, out, begin, end, scratch);
    case Format::kTernary5: return scaled_format<Isa, Format::kTernary5>(p, s, out, begin, end, scratch);
    case Format::kInt4: return scaled_format<Isa, Format::kInt4>(p, s, out, begin, end, scratch);
    case Format::kInt8: return scaled_format<Isa, Format::kInt8>(p, s, out, begin, end, scratch);
    case Format::kUint4: return scaled_format<Isa, Format::kUint4>(p, s, out, begin, end, scratch);
  }
}

}  // namespace
}  // namespace bitnet

#endif  // BITNET_KERNELS_PANEL_SCALED_H_
