// The algorithms of every instruction set with vectors: few rows of x, many rows of x.
//
// An instruction set is a struct Isa with
//
//   Bytes, Sums             vectors of packed bytes or fields; of int32, a lane for each row of the matrix
//   kLanes                  rows of the matrix in a vector
//   slots(format, rows)     accumulators of one row of x and one vector, of rows at a time (see Fields)
//   kStreams                panels that one row of x is multiplied with in step
//   kFusedRows, few_rows(format)    rows of x multiplied while fields are taken: at a time, and at most
//   kTilePanels, kTileRows  accumulators of more rows: panels of the matrix by rows of x
//   partial_limit(format)   partial sums reach down to minus this (2^15 for int16); 0 where they are Sums
//   offset(format)          times sum(x) is to be subtracted; that of the format where products are exact
//   load, broadcast, splat, bit_and, min, subtract, shift_right<bits>, look_up(16 bytes, indices)    on Bytes
//   dot<format>(partial, fields, x)    a partial sum with four products more in each lane
//   finish<format>(partial)            a partial sum as Sums
//   zero, fill, add, divide<scale> (exact), load_sums, store    on Sums
//
// and what panel_scaled.h lists for scales.

#ifndef BITNET_KERNELS_PANEL_MATMUL_H_
#define BITNET_KERNELS_PANEL_MATMUL_H_

#include "panel_fields.h"

namespace bitnet {
namespace {

// How many products of a field of 1, of each pair of x, an accumulator of a partial sum holds.
template <typename Isa, Format kFormat>
constexpr int64_t kPartialTerms = Isa::partial_limit(kFormat) / (2 * 128 * highest_field(kFormat));

// Blocks after which partial sums are finished.
template <typename Isa, Format kFormat, int kSlots>
constexpr int64_t partial_blocks() {
  int64_t terms = 1;  // of a block, in the fullest slot
  for (int slot = 0; slot < kSlots; ++slot) {
    const int64_t sharing = (fields(kFormat) - slot + kSlots - 1) / kSlots;
    terms = std::max(terms, sharing * Fields<Isa, kFormat, kSlots>::scale(slot));
  }
  return kPartialTerms<Isa, kFormat> / terms;
}

// y = (first ? -offset x_sum : y) + multiplier sums, for the real rows of a panel.
template <typename Isa, Format kFormat>
BITNET_INLINE void add_to_outputs(const Problem& p, int64_t g, int64_t row, int64_t panel, bool first,
                                  const typename Isa::Sums* sums) {
  const auto start = Isa::fill(-Isa::offset(kFormat) * p.x_sum(row, g));
  int32_t* y = p.outputs(g, row, panel);
  int32_t edge[kPanelRows];
  const int64_t rows = p.panel_rows(panel);
  int32_t* target = rows == kPanelRows ? y : edge;
  if (rows < kPanelRows && !first) std::memcpy(edge, y, rows * sizeof(int32_t));
  unrolled<kPanelRows / Isa::kLanes>([&](auto v) BITNET_INLINE_BODY {
    const auto sum = multiplier(kFormat) == 2 ? Isa::add(sums[v], sums[v]) : sums[v];
    int32_t* lanes = target + v * Isa::kLanes;
    Isa::store(lanes, Isa::add(sum, first ? start : Isa::load_sums(lanes)));
  });
  if (rows < kPanelRows) std::memcpy(y, edge, rows * sizeof(int32_t));
}

// Sums of fields over one group: kRows rows of x, which begin at x, times kPanels panels, which begin at w and are walked
// in step, stream bytes apart. Lines are fetched into L1 `ahead` bytes before they are loaded.
template <typename Isa, Format kFormat, int kRows, int kPanels>
BITNET_INLINE void packed_sums(const uint8_t* w, int64_t stream, int64_t ahead, const int8_t* x, int64_t x_stride,
                               int64_t group_blocks, typename Isa::Sums (*totals)[kPanels * kPanelRows / Isa::kLanes]) {
  constexpr int kPanelVectors = kPanelRows / Isa::kLanes, kVectors = kPanels * kPanelVectors;
  constexpr int kSlots = Isa::slots(kFormat, kRows);
  using BlockFields = Fields<Isa, kFormat, kSlots>;
  unrolled<kRows * kVectors>([&](auto i) BITNET_INLINE_BODY { totals[i / kVectors][i % kVectors] = Isa::zero(); });
  for (int64_t left = group_blocks, blocks = left; left > 0; left -= blocks) {
    if constexpr (Isa::partial_limit(kFormat) > 0) blocks = std::min(left, partial_blocks<Isa, kFormat, kSlots>());
    typename Isa::Sums sums[kRows][kVectors][kSlots];
    unrolled<kRows * kVectors * kSlots>([&](auto i) BITNET_INLINE_BODY {
      sums[i / (kVectors * kSlots)][i / kSlots % kVectors][i % kSlots] = Isa::zero();
    });
    for (int64_t b = 0; b < blocks; ++b, w += kBlockBytes, x += block_inputs(kFormat)) {
      BlockFields block[kVectors];
      unrolled<kPanels>([&](auto i) BITNET_INLINE_BODY { __builtin_prefetch(w + i * stream + ahead, 0, 3); });
      unrolled<kVectors>([&](auto v) BITNET_INLINE_BODY {
        block[v].start(Isa::load(w + v / kPanelVectors * stream + v % kPanelVectors * 4 * Isa::kLanes));
      });
      unrolled<fields(kFormat)>([&](auto i) BITNET_INLINE_BODY {
        constexpr int s = fields(kFormat) - 1 - i;
        typename Isa::Bytes taken[kVectors];
        unrolled<kVectors>([&](auto v) BITNET_INLINE_BODY { taken[v] = block[v].template take<s>(); });
        unrolled<kRows>([&](auto t) BITNET_INLINE_BODY {
          const auto x4 = Isa::broadcast(x + t * x_stride + 4 * s);
          unrolled<kVectors>([&](auto v) BITNET_INLINE_BODY {
            auto& sum = sums[t][v][s % kSlots];
            sum = Isa::template dot<kFormat>(sum, taken[v], x4);
          });
        });
      });
    }
    unrolled<kRows * kVectors * kSlots>([&](auto i) BITNET_INLINE_BODY {
      constexpr int t = i / (kVectors * kSlots), v = i / kSlots % kVectors, slot = i % kSlots;
      const auto sum = Isa::template finish<kFormat>(sums[t][v][slot]);
      totals[t][v] = Isa::add(totals[t][v], Isa::template divide<BlockFields::scale(slot)>(sum));
    });
  }
}

// kRows rows of x times kPanels panels, panel_step apart and walked in step: as many streams from memory.
template <typename Isa, Format kFormat, int kRows, int kPanels>
void multiply_packed(const Problem& p, int64_t row, int64_t panel, int64_t panel_step) {
  constexpr int kPanelVectors = kPanelRows / Isa::kLanes;
  for (int64_t g = 0; g < p.groups; ++g) {
    typename Isa::Sums totals[kRows][kPanels * kPanelVectors];
    packed_sums<Isa, kFormat, kRows, kPanels>(p.block(panel, g, 0), panel_step * p.panel_bytes(), p.ahead,
                                              p.inputs(row, g, 0), p.x_stride, p.group_blocks, totals);
    unrolled<kRows * kPanels>([&](auto i) BITNET_INLINE_BODY {
      constexpr int t = i / kPanels, j = i % kPanels;
      add_to_outputs<Isa, kFormat>(p, g, row + t, panel + j * panel_step, true, totals[t] + j * kPanelVectors);
    });
  }
}

// Unpacks blocks of up to kTilePanels panels to unpacked[input / 4][panel][vector]; calls each() for every block.
template <typename Isa, Format kFormat, typename Each>
BITNET_INLINE void unpack(const Problem& p, int64_t panel, int64_t panels, int64_t g, int64_t b, int64_t blocks,
                          typename Isa::Bytes* unpacked, Each&& each) {
  constexpr int kPanelVectors = kPanelRows / Isa::kLanes, kVectors = Isa::kTilePanels * kPanelVectors;
  for (int64_t i = 0; i < panels; ++i) {
    const uint8_t* w = p.block(panel + i, g, b);
    typename Isa::Bytes* out = unpacked + i * kPanelVectors;
    for (int64_t block = 0; block < blocks; ++block, w += kBlockBytes, out += fields(kFormat) * kVectors) {
      each();
      unrolled<kPanelVectors>([&](auto v) BITNET_INLINE_BODY {
        Fields<Isa, kFormat, 1> taken;
        taken.start(Isa::load(w + v * 4 * Isa::kLanes));
        unrolled<fields(kFormat)>([&](auto j) BITNET_INLINE_BODY {
          constexpr int s = fields(kFormat) - 1 - j;
          out[s * kVectors + v] = taken.template take<s>();
        });
      });
    }
  }
}

template <typename Isa, Format kFormat>
void unpack(const Problem& p, int64_t panel, int64_t panels, int64_t g, int64_t b, int64_t blocks,
            typename Isa::Bytes* unpacked) {
  unpack<Isa, kFormat>(p, panel, panels, g, b, blocks, unpacked, [] {});
}

// Sums of fields: kRows rows of x, which begin at x, times `length` steps of four inputs of an unpacked tile.
template <typename Isa, Format kFormat, int kRows>
BITNET_INLINE void unpacked_sums(const typename Isa::Bytes* unpacked, const int8_t* x, int64_t x_stride, int64_t length,
                                 typename Isa::Sums (*totals)[Isa::kTilePanels * kPanelRows / Isa::kLanes]) {
  constexpr int kVectors = Isa::kTilePanels * kPanelRows / Isa::kLanes;
  unrolled<kRows * kVectors>([&](auto i) BITNET_INLINE_BODY { totals[i / kVectors][i % kVectors] = Isa::zero(); });
  for (int64_t left = length, steps = left; left > 0; left -= steps) {
    if constexpr (Isa::partial_limit(kFormat) > 0) steps = std::min(left, kPartialTerms<Isa, kFormat>);
    typename Isa::Sums sums[kRows][kVectors];
    unrolled<kRows * kVectors>([&](auto i) BITNET_INLINE_BODY { sums[i / kVectors][i % kVectors] = Isa::zero(); });
    for (int64_t step = 0; step < steps; ++step, x += 4, unpacked += kVectors) {
      typename Isa::Bytes w[kVectors];
      unrolled<kVectors>([&](auto v) BITNET_INLINE_BODY { w[v] = Isa::load(unpacked + v); });
      unrolled<kRows>([&](auto t) BITNET_INLINE_BODY {
        const auto x4 = Isa::broadcast(x + t * x_stride);
        unrolled<kVectors>([&](auto v) BITNET_INLINE_BODY {
          sums[t][v] = Isa::template dot<kFormat>(sums[t][v], w[v], x4);
        });
      });
    }
    unrolled<kRows * kVectors>([&](auto i) BITNET_INLINE_BODY {
      auto& total = totals[i / kVectors][i % kVectors];
      total = Isa::add(total, Isa::template finish<kFormat>(sums[i / kVectors][i % kVectors]));
    });
  }
}

// kRows rows of x times an unpacked tile of the matrix, added to y.
template <typename Isa, Format kFormat, int kRows>
void multiply_unpacked(const Problem& p, int64_t row, int64_t panel, int64_t panels, int64_t g, int64_t b,
                       int64_t blocks, const typename Isa::Bytes* unpacked) {
  constexpr int kPanelVectors = kPanelRows / Isa::kLanes;
  typename Isa::Sums totals[kRows][Isa::kTilePanels * kPanelVectors];
  unpacked_sums<Isa, kFormat, kRows>(unpacked, p.inputs(row, g, b), p.x_stride, blocks * fields(kFormat), totals);
  for (int64_t i = 0; i < panels; ++i) {
    unrolled<kRows>([&](auto t) BITNET_INLINE_BODY {
      add_to_outputs<Isa, kFormat>(p, g, row + t, panel + i, b == 0, totals[t] + i * kPanelVectors);
    });
  }
}

template <typename Isa, Format kFormat, int kRows = Isa::kTileRows>
void multiply_unpacked_rows(const Problem& p, int64_t row, int64_t panel, int64_t panels, int64_t g, int64_t b,
                            int64_t blocks, const typename Isa::Bytes* unpacked) {
  if constexpr (kRows > 0) {
    for (; row + kRows <= p.m; row += kRows) {
      multiply_unpacked<Isa, kFormat, kRows>(p, row, panel, panels, g, b, blocks, unpacked);
    }
    multiply_unpacked_rows<Isa, kFormat, kRows - 1>(p, row, panel, panels, g, b, blocks, unpacked);
  }
}

// Many rows of x: a tile of the matrix is unpacked once for all of them.
template <typename Isa, Format kFormat>
void many_rows(const Problem& p, int64_t begin, int64_t end) {
  constexpr int64_t kTileBlocks = kTileInputs / block_inputs(kFormat);
  constexpr int kVectors = Isa::kTilePanels * kPanelRows / Isa::kLanes;
  typename Isa::Bytes unpacked[kTileBlocks * fields(kFormat) * kVectors];
  for (int64_t panel = begin; panel < end; panel += Isa::kTilePanels) {
    const int64_t panels = std::min<int64_t>(Isa::kTilePanels, end - panel);
    if (panels < Isa::kTilePanels) std::memset(unpacked, 0, sizeof(unpacked));  // absent panels are multiplied too
    for (int64_t g = 0; g < p.groups; ++g) {
      for (int64_t b = 0; b < p.group_blocks; b += kTileBlocks) {
        const int64_t blocks = std::min(kTileBlocks, p.group_blocks - b);
        unpack<Isa, kFormat>(p, panel, panels, g, b, blocks, unpacked);
        multiply_unpacked_rows<Isa, kFormat>(p, 0, panel, panels, g, b, blocks, unpacked);
      }
    }
  }
}

template <typename Isa, Format kFormat, int kPanels, int kRows = Isa::kFusedRows>
void multiply_packed_rows(const Problem& p, int64_t row, int64_t panel, int64_t panel_step) {
  if constexpr (kRows > 0) {
    for (; row + kRows <= p.m; row += kRows) multiply_packed<Isa, kFormat, kRows, kPanels>(p, row, panel, panel_step);
    multiply_packed_rows<Isa, kFormat, kPanels, kRows - 1>(p, row, panel, panel_step);
  }
}

// Few rows of x: the panels are cut into kStreams runs walked in step; all rows of x meet a panel while it is in cache.
// The remaining panels, fewer than kStreams, meet one row at a time: more rows would need code of their own.
template <typename Isa, Format kFormat>
void few_rows(const Problem& p, int64_t begin, int64_t end) {
  const int64_t run = (end - begin) / Isa::kStreams, rest = begin + run * Isa::kStreams;
  for (int64_t i = 0; i < run; ++i) multiply_packed_rows<Isa, kFormat, Isa::kStreams>(p, 0, begin + i, run);
  for (int64_t panel = rest; panel < end; ++panel) multiply_packed_rows<Isa, kFormat, 1, 1>(p, 0, panel, 0);
}

template <typename Isa, Format kFormat>
void matmul_format(const Problem& p, int64_t begin, int64_t end) {
  p.m <= Isa::few_rows(kFormat) ? few_rows<Isa, kFormat>(p, begin, end) : many_rows<Isa, kFormat>(p, begin, end);
}

template <typename Isa>
void matmul(const Problem& p, int64_t begin, int64_t end) {
  switch (p.format) {
    case Format::kBinary: return matmul_format<Isa, Format::kBinary>(p, begin, end);
    case Format::kTernary2: return matmul_format<Isa, Format::kTernary2>(p, begin, end);
    case Format::kTernary5: return matmul_format<Isa, Format::kTernary5>(p, begin, end);
    case Format::kInt4: return matmul_format<Isa, Format::kInt4>(p, begin, end);
    case Format::kInt8: return matmul_format<Isa, Format::kInt8>(p, begin, end);
    case Format::kUint4: return matmul_format<Isa, Format::kUint4>(p, begin, end);
  }
}

int32_t sum(const int8_t* x, int64_t count) {
  int32_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += x[i];
  return total;
}

}  // namespace
}  // namespace bitnet

#endif  // BITNET_KERNELS_PANEL_MATMUL_H_
