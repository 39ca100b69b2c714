// AMX: a tile register holds 16 rows of 64 bytes. tdpbsud multiplies 16 rows of x by 64 inputs with the same inputs of
// 16 rows of the matrix, four products to an int32 of a 16 x 16 tile of sums. An unpacked panel, [input / 4][row][4],
// is its second operand without any conversion. Few rows of x are left to AVX-512.

#ifndef BITNET_KERNELS_PANEL_AMX_H_
#define BITNET_KERNELS_PANEL_AMX_H_

#include "panel_avx512vbmi.h"
#include "panel_matmul.h"

namespace bitnet {
namespace {

struct Amx : Avx512Vbmi {
  static constexpr int kTilePanels = 2;
};

template <int kSlots>
struct Fields<Amx, Format::kTernary5, kSlots> : Fields<Avx512Vbmi, Format::kTernary5, kSlots> {};

constexpr int64_t kAmxFewRows = 4;        // of x, which AVX-512 multiplies as fast as tiles do
constexpr int64_t kUnpackAhead = 4096;    // bytes of a panel, from those that are unpacked to those that are fetched
constexpr int64_t kAmxRows = 16;          // of a tile
constexpr int64_t kAmxInputs = 64;        // of a tile
constexpr int64_t kAmxTileInputs = 4096;  // of two panels, unpacked at a time: 128 KiB

// Shapes of the tile registers: 0 to 3 sums [x tile][panel], 4 and 5 x, 6 and 7 the matrix.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// For rows of x in two tiles (the second may be empty: then it is not used).
BITNET_INLINE void shape_tiles(int64_t rows) {
  TileShapes shapes;
  const int64_t x_rows[2] = {std::min(rows, kAmxRows), std::max<int64_t>(1, rows - kAmxRows)};
  for (int tile = 0; tile < 8; ++tile) {
    shapes.row_bytes[tile] = 64;
    shapes.rows[tile] = static_cast<uint8_t>(tile >= 6 ? 16 : x_rows[tile < 4 ? tile / 2 : tile - 4]);
  }
  asm volatile("" : : "r"(&shapes) : "memory");  // gcc does not know what the instructions of AMX read
  _tile_loadconfig(&shapes);
}

// kTiles tiles of x, x_stride bytes between rows, times two unpacked panels, added to the tiles of sums; calls each()
// for every tile of inputs.
template <int kTiles, typename Each>
BITNET_INLINE void multiply_tiles(const int8_t* x, int64_t x_stride, const __m512i* unpacked, int64_t tiles, Each&& each) {
  for (int64_t i = 0; i < tiles; ++i, x += kAmxInputs, unpacked += 2 * kAmxInputs / 4) {
    each();
    _tile_loadd(6, unpacked, 128);
    _tile_loadd(4, x, x_stride);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(7, unpacked + 1, 128);
    _tile_dpbsud(1, 4, 7);
    if constexpr (kTiles == 2) {
      _tile_loadd(5, x + kAmxRows * x_stride, x_stride);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
  }
}

// rows <= 16 kTiles rows of x times unpacked inputs of two panels, added to the tiles of sums.
template <int kTiles, typename Each>
BITNET_INLINE void accumulate(const int8_t* x, int64_t x_stride, int64_t rows, int64_t inputs, const __m512i* unpacked,
                              Each&& each) {
  asm volatile("" : : "r"(unpacked) : "memory");  // gcc does not know what the instructions of AMX read
  const int64_t whole = inputs / kAmxInputs, rest = inputs % kAmxInputs;
  multiply_tiles<kTiles>(x, x_stride, unpacked, whole, each);
  if (rest > 0) {  // x ends within a tile: nothing behind it may be read
    alignas(64) int8_t tail[kTiles * kAmxRows][kAmxInputs] = {};
    for (int64_t t = 0; t < rows; ++t) std::memcpy(tail[t], x + t * x_stride + whole * kAmxInputs, rest);
    asm volatile("" : : "r"(tail) : "memory");
    multiply_tiles<kTiles>(tail[0], kAmxInputs, unpacked + whole * 2 * kAmxInputs / 4, 1, each);
  }
}

BITNET_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Adds the tiles of sums to y, or writes them where they are the first ones.
template <Format kFormat, int kTiles>
BITNET_INLINE void add_tiles(const Problem& p, int64_t row, int64_t rows, int64_t panel, int64_t panels, int64_t g,
                             bool first) {
  __m512i sums[2][kTiles * kAmxRows];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  if constexpr (kTiles == 2) {
    _tile_stored(2, sums[0] + kAmxRows, 64);
    _tile_stored(3, sums[1] + kAmxRows, 64);
  }
  for (int64_t i = 0; i < panels; ++i) {
    const __mmask16 mask = static_cast<__mmask16>((1u << p.panel_rows(panel + i)) - 1);
    int32_t* y = p.outputs(g, row, panel + i);
    for (int64_t t = 0; t < rows; ++t, y += p.n) {
      const __m512i sum = multiplier(kFormat) == 2 ? _mm512_slli_epi32(sums[i][t], 1) : sums[i][t];
      const __m512i start = first ? _mm512_set1_epi32(-offset(kFormat) * p.x_sum(row + t, g))
                                  : _mm512_maskz_loadu_epi32(mask, y);
      _mm512_mask_storeu_epi32(y, mask, _mm512_add_epi32(start, sum));
    }
  }
}

// Unpacks blocks of one or two panels, and zeros behind them up to whole tiles. Returns their number of inputs.
template <Format kFormat, typename Each>
BITNET_INLINE int64_t unpack_tiles(const Problem& p, int64_t panel, int64_t panels, int64_t g, int64_t b, int64_t blocks,
                                   __m512i* unpacked, Each&& each) {
  unpack<Amx, kFormat>(p, panel, panels, g, b, blocks, unpacked, each);
  const int64_t inputs = blocks * block_inputs(kFormat);
  const int64_t padded = (inputs + kAmxInputs - 1) / kAmxInputs * kAmxInputs;
  std::memset(unpacked + 2 * inputs / 4, 0, 2 * (padded - inputs) / 4 * sizeof(__m512i));
  return inputs;
}

// Half of the lines of two panels that hold the inputs of a tile.
template <Format kFormat>
constexpr int kTileLines = std::max<int>(1, kAmxInputs / block_inputs(kFormat));

// Up to two tiles of rows of x: their sums stay in the tiles over all inputs, which are unpacked a few at a time, into a
// first-level cache.
template <Format kFormat, int kTiles>
void some_rows_amx(const Problem& p, int64_t begin, int64_t end) {
  // Whole tiles of every format: 640 inputs of ternary5, 512 of the others.
  constexpr int64_t kBlocks = kFormat == Format::kTernary5 ? 32 : 512 / block_inputs(kFormat);
  __m512i unpacked[2 * kBlocks * block_inputs(kFormat) / 4];
  if (begin + 1 == end) std::memset(unpacked, 0, sizeof(unpacked));  // an absent panel is multiplied too
  shape_tiles(p.m);
  for (int64_t panel = begin; panel < end; panel += 2) {
    const int64_t panels = std::min<int64_t>(2, end - panel);
    for (int64_t g = 0; g < p.groups; ++g) {
      zero_sums();
      for (int64_t b = 0; b < p.group_blocks; b += kBlocks) {
        const int64_t blocks = std::min(kBlocks, p.group_blocks - b);
        // The lines of both panels that are needed kUnpackAhead later, half of them while blocks are unpacked and half
        // while tiles are multiplied: memory is never idle.
        const uint8_t* lines[2] = {p.block(panel, g, b) + kUnpackAhead, p.block(panel + panels - 1, g, b) + kUnpackAhead};
        int64_t turn = 0;
        const auto fetch = [&] { __builtin_prefetch(lines[turn & 1] + (turn >> 1) * kBlockBytes), ++turn; };
        auto every_second = [&, odd = false]() mutable {
          if (odd) fetch();
          odd = !odd;
        };
        const auto in_steps = [&] {
          unrolled<kTileLines<kFormat>>([&](auto) BITNET_INLINE_BODY { fetch(); });
        };
        const int64_t inputs = unpack_tiles<kFormat>(p, panel, panels, g, b, blocks, unpacked, every_second);
        accumulate<kTiles>(p.inputs(0, g, b), p.x_stride, p.m, inputs, unpacked, in_steps);
      }
      add_tiles<kFormat, kTiles>(p, 0, p.m, panel, panels, g, true);
    }
  }
  _tile_release();
}

template <Format kFormat>
void many_rows_amx(const Problem& p, int64_t begin, int64_t end) {
  constexpr int64_t kTileBlocks = kAmxTileInputs / block_inputs(kFormat);
  constexpr int64_t kStepRows = 2 * kAmxRows;
  __m512i unpacked[2 * kAmxTileInputs / 4];
  if (begin + 1 == end) std::memset(unpacked, 0, sizeof(unpacked));  // an absent panel is multiplied too
  int64_t shaped = 0;  // rows
  for (int64_t panel = begin; panel < end; panel += 2) {
    const int64_t panels = std::min<int64_t>(2, end - panel);
    for (int64_t g = 0; g < p.groups; ++g) {
      for (int64_t b = 0; b < p.group_blocks; b += kTileBlocks) {
        const int64_t blocks = std::min(kTileBlocks, p.group_blocks - b), inputs = blocks * block_inputs(kFormat);
        unpack_tiles<kFormat>(p, panel, panels, g, b, blocks, unpacked, [] {});
        for (int64_t row = 0; row < p.m; row += kStepRows) {
          const int64_t rows = std::min(kStepRows, p.m - row);
          if (rows != shaped) shape_tiles(shaped = rows);
          zero_sums();
          if (rows > kAmxRows) {
            accumulate<2>(p.inputs(row, g, b), p.x_stride, rows, inputs, unpacked, [] {});
            add_tiles<kFormat, 2>(p, row, rows, panel, panels, g, b == 0);
          } else {
            accumulate<1>(p.inputs(row, g, b), p.x_stride, rows, inputs, unpacked, [] {});
            add_tiles<kFormat, 1>(p, row, rows, panel, panels, g, b == 0);
          }
        }
      }
    }
  }
  _tile_release();
}

template <Format kFormat>
void matmul_amx_format(const Problem& p, int64_t begin, int64_t end) {
  if (p.m > 2 * kAmxRows) return many_rows_amx<kFormat>(p, begin, end);
  p.m > kAmxRows ? some_rows_amx<kFormat, 2>(p, begin, end) : some_rows_amx<kFormat, 1>(p, begin, end);
}

void matmul_amx(const Problem& p, int64_t begin, int64_t end) {
  if (p.m <= kAmxFewRows) return matmul_avx512vbmi(p, begin, end);
  switch (p.format) {
    case Format::kBinary: return matmul_amx_format<Format::kBinary>(p, begin, end);
    case Format::kTernary2: return matmul_amx_format<Format::kTernary2>(p, begin, end);
    case Format::kTernary5: return matmul_amx_format<Format::kTernary5>(p, begin, end);
    case Format::kInt4: return matmul_amx_format<Format::kInt4>(p, begin, end);
    case Format::kInt8: return matmul_amx_format<Format::kInt8>(p, begin, end);
    case Format::kUint4: return matmul_amx_format<Format::kUint4>(p, begin, end);
  }
}

}  // namespace
}  // namespace bitnet

#endif  // BITNET_KERNELS_PANEL_AMX_H_
