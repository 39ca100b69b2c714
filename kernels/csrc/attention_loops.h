// The loops of attention.h over Lanes, 16 floats of an instruction set. Included by attention_<name>.cc, which first
// defines BITNET_TARGET, the attribute that lets a function use that instruction set.
//
// Lanes has a type Vec and: load, store, set1, add, sub, mul, fma (a b + c, one rounding), max (a > b ? a : b),
// where_less (a < b ? x : y), load_bfloat16, load_int8, times_power (bits of y + bits of t << 23), first, sum_of,
// max_of, store_sums; kScoreKeys keys and kScoreRows rows of a tile of scores, kMixVectors vectors of a tile of mixes.

#include <cstring>
#include <limits>

#include "attention.h"
#include "integer_matmul.h"

#define BITNET_INLINE BITNET_TARGET inline __attribute__((always_inline))

namespace bitnet {
namespace {

template <typename Lanes>
struct Loops {
  using Vec = typename Lanes::Vec;
  static constexpr float kNothing = -std::numeric_limits<float>::infinity();

  // exp(x) for x <= 0, relative error below 2^-23. Less than exp(-60) = 2^-86 counts as 0: beside a weight of 1 it is
  // nothing, and products with it would be slow subnormal numbers. Cephes' polynomial.
  BITNET_INLINE static Vec exp(Vec x) {
    const Vec magic = Lanes::set1(12582912.0f);  // 1.5 * 2^23: the sum holds the rounded integer in its low bits
    const Vec t = Lanes::fma(x, Lanes::set1(1.44269504088896341f), magic);
    const Vec n = Lanes::sub(t, magic);
    Vec r = Lanes::fma(n, Lanes::set1(-0.693359375f), x);
    r = Lanes::fma(n, Lanes::set1(2.12194440e-4f), r);
    Vec y = Lanes::set1(1.9875691500e-4f);
    y = Lanes::fma(y, r, Lanes::set1(1.3981999507e-3f));
    y = Lanes::fma(y, r, Lanes::set1(8.3334519073e-3f));
    y = Lanes::fma(y, r, Lanes::set1(4.1665795894e-2f));
    y = Lanes::fma(y, r, Lanes::set1(1.6666665459e-1f));
    y = Lanes::fma(y, r, Lanes::set1(5.0000001201e-1f));
    y = Lanes::add(Lanes::fma(y, Lanes::mul(r, r), r), Lanes::set1(1.0f));
    return Lanes::where_less(x, Lanes::set1(-60.0f), Lanes::set1(0.0f), Lanes::times_power(y, t));
  }

  // Rows of keys or values as float32.
  struct Rows {
    const float* data;
    int64_t stride;
    BITNET_INLINE const float* row(int64_t i) const { return data + i * stride; }
  };

  BITNET_INLINE static float convert(const ChunkProblem& p, const void* base, int64_t i) {
    if (p.type == KvType::kFloat32) return static_cast<const float*>(base)[i];
    if (p.type == KvType::kInt8) return static_cast<const int8_t*>(base)[i];
    const uint32_t bits = uint32_t{static_cast<const uint16_t*>(base)[i]} << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }

  BITNET_INLINE static Vec convert16(const ChunkProblem& p, const void* base, int64_t i) {
    if (p.type == KvType::kFloat32) return Lanes::load(static_cast<const float*>(base) + i);
    if (p.type == KvType::kInt8) return Lanes::load_int8(static_cast<const int8_t*>(base) + i);
    return Lanes::load_bfloat16(static_cast<const uint16_t*>(base) + i);
  }

  // Keys or values [first, first + count) of the chunk: where they lie, if a few rows read them once, else a copy
  // without the other heads between them.
  BITNET_TARGET static Rows rows_of(const ChunkProblem& p, const void* base, int64_t first, int64_t count) {
    if (p.type == KvType::kFloat32 && p.head_size == p.padded && p.rows <= 2 * kTileRows) {
      return {static_cast<const float*>(base) + first * p.stride, p.stride};
    }
    const int64_t whole = p.head_size / kLanes * kLanes;
    for (int64_t i = 0; i < count; ++i) {
      float* to = p.block + i * p.padded;
      const int64_t from = (first + i) * p.stride;
      for (int64_t d = 0; d < whole; d += kLanes) Lanes::store(to + d, convert16(p, base, from + d));
      for (int64_t d = whole; d < p.padded; ++d) to[d] = d < p.head_size ? convert(p, base, from + d) : 0.0f;
    }
    return {p.block, p.padded};
  }

  // The keys of [first, last) that some row of a tile can see, as [begin, end).
  BITNET_INLINE static void clip(const ChunkProblem& p, int64_t row, int64_t rows, int64_t first, int64_t last,
                                 int64_t& begin, int64_t& end) {
    begin = last, end = first;
    for (int64_t r = row; r < row + rows; ++r) {
      if (p.sight[r].begin < begin) begin = p.sight[r].begin;
      if (p.sight[r].end > end) end = p.sight[r].end;
    }
    begin = begin < first ? first : begin;
    end = end > last ? last : end;
  }

  BITNET_INLINE static void score_tile(const float* q, int64_t padded, const float* const k[], float* scores) {
    constexpr int R = Lanes::kScoreRows, C = Lanes::kScoreKeys;
    Vec sums[R * C];
    BITNET_UNROLL
    for (int i = 0; i < R * C; ++i) sums[i] = Lanes::set1(0.0f);
    for (int64_t d = 0; d < padded; d += kLanes) {
      Vec keys[C];
      BITNET_UNROLL
      for (int c = 0; c < C; ++c) keys[c] = Lanes::load(k[c] + d);
      BITNET_UNROLL
      for (int r = 0; r < R; ++r) {
        const Vec row = Lanes::load(q + r * padded + d);
        BITNET_UNROLL
        for (int c = 0; c < C; ++c) sums[r * C + c] = Lanes::fma(row, keys[c], sums[r * C + c]);
      }
    }
    Lanes::store_sums(sums, scores);
  }

  // scores = q.k for what the rows can see; hidden places beside it get any number.
  BITNET_TARGET static void score(const ChunkProblem& p) {
    constexpr int64_t R = Lanes::kScoreRows, C = Lanes::kScoreKeys;
    for (int64_t first = 0; first < p.keys; first += kBlockKeys) {
      const int64_t last = first + kBlockKeys < p.keys ? first + kBlockKeys : p.keys;
      int64_t begin, end;
      clip(p, 0, p.rows, first, last, begin, end);
      if (begin >= end) continue;
      const Rows keys = rows_of(p, p.k, first, last - first);
      for (int64_t row = 0; row < p.rows; row += R) {
        clip(p, row, R, first, last, begin, end);
        for (int64_t key = begin / C * C; key < end; key += C) {
          const float* k[C];
          for (int64_t c = 0; c < C; ++c) k[c] = keys.row((key + c < last ? key + c : last - 1) - first);
          score_tile(p.q + row * p.padded, p.padded, k, p.scores + row * kChunkKeys + key);
        }
      }
    }
  }

  // scores = exp(scores - largest), times the scales of the values, and the largest and the sum of a row.
  BITNET_TARGET static void weigh(const ChunkProblem& p, int64_t row, const Partial& out) {
    const Sight& sight = p.sight[row];
    float* scores = p.scores + row * kChunkKeys;
    const Vec zero = Lanes::set1(0.0f), nothing = Lanes::set1(kNothing);
    Vec largest = nothing;
    for (int64_t i = 0; sight.begin < sight.end && i < kChunkKeys; i += kLanes) {
      Vec s = Lanes::load(scores + i);
      if (p.k_scale != nullptr) s = Lanes::mul(s, Lanes::load(p.k_scale + i));
      s = Lanes::where_less(Lanes::load(sight.hidden + i), zero, nothing, s);
      Lanes::store(scores + i, s);
      largest = Lanes::max(largest, s);
    }
    out.largest[row] = Lanes::max_of(largest);
    out.sum[row] = 0.0f;
    if (out.largest[row] == kNothing) {
      for (int64_t i = 0; i < kChunkKeys; i += kLanes) Lanes::store(scores + i, zero);
      return;
    }
    largest = Lanes::set1(out.largest[row]);
    Vec sum = zero;
    for (int64_t i = 0; i < kChunkKeys; i += kLanes) {
      Vec weight = exp(Lanes::sub(Lanes::load(scores + i), largest));
      sum = Lanes::add(sum, weight);
      if (p.v_scale != nullptr) weight = Lanes::mul(weight, Lanes::load(p.v_scale + i));
      Lanes::store(scores + i, weight);
    }
    out.sum[row] = Lanes::sum_of(sum);
  }

  // mix += sum over keys [begin, end) of weight * value, for kTileRows rows and V vectors of channels.
  template <int V>
  BITNET_INLINE static void mix_tile(const float* weights, const Rows& values, int64_t channel, int64_t begin,
                                     int64_t end, int64_t first, float* mix, int64_t padded) {
    Vec sums[kTileRows * V];
    BITNET_UNROLL
    for (int i = 0; i < kTileRows * V; ++i) sums[i] = Lanes::load(mix + i / V * padded + i % V * kLanes);
    for (int64_t key = begin; key < end; ++key) {
      const float* value = values.row(key - first) + channel;
      Vec vectors[V];
      BITNET_UNROLL
      for (int i = 0; i < V; ++i) vectors[i] = Lanes::load(value + i * kLanes);
      BITNET_UNROLL
      for (int r = 0; r < kTileRows; ++r) {
        const Vec weight = Lanes::set1(weights[r * kChunkKeys + key]);
        BITNET_UNROLL
        for (int i = 0; i < V; ++i) sums[r * V + i] = Lanes::fma(weight, vectors[i], sums[r * V + i]);
      }
    }
    BITNET_UNROLL
    for (int i = 0; i < kTileRows * V; ++i) Lanes::store(mix + i / V * padded + i % V * kLanes, sums[i]);
  }

  BITNET_TARGET static void mix(const ChunkProblem& p, const Partial& out) {
    constexpr int64_t V = Lanes::kMixVectors;
    std::memset(out.mix, 0, sizeof(float) * p.rows * p.padded);
    for (int64_t first = 0; first < p.keys; first += kBlockKeys) {
      const int64_t last = first + kBlockKeys < p.keys ? first + kBlockKeys : p.keys;
      int64_t begin, end;
      clip(p, 0, p.rows, first, last, begin, end);
      if (begin >= end) continue;
      const Rows values = rows_of(p, p.v, first, last - first);
      for (int64_t row = 0; row < p.rows; row += kTileRows) {
        clip(p, row, kTileRows, first, last, begin, end);
        if (begin >= end) continue;
        const float* weights = p.scores + row * kChunkKeys;
        float* mix = out.mix + row * p.padded;
        int64_t d = 0;
        for (; d + V * kLanes <= p.padded; d += V * kLanes) {
          mix_tile<V>(weights, values, d, begin, end, first, mix + d, p.padded);
        }
        for (; d < p.padded; d += kLanes) mix_tile<1>(weights, values, d, begin, end, first, mix + d, p.padded);
      }
    }
    // A tile adds 0 * v for the keys that only its other rows see, which may turn -0 to +0: it is +0 always.
    for (int64_t i = 0; i < p.rows * p.padded; i += kLanes) {
      Lanes::store(out.mix + i, Lanes::add(Lanes::load(out.mix + i), Lanes::set1(0.0f)));
    }
  }

  BITNET_TARGET static void chunk(const ChunkProblem& p, const Partial& out) {
    score(p);
    for (int64_t row = 0; row < p.rows; ++row) weigh(p, row, out);
    mix(p, out);
  }

  BITNET_TARGET static void merge(const Partial& into, const Partial& from, int64_t rows, int64_t padded) {
    for (int64_t row = 0; row < rows; ++row) {
      if (from.largest[row] == kNothing) continue;
      const float largest = into.largest[row] > from.largest[row] ? into.largest[row] : from.largest[row];
      const Vec a = exp(Lanes::set1(into.largest[row] - largest)), b = exp(Lanes::set1(from.largest[row] - largest));
      const Vec sum = Lanes::mul(Lanes::set1(from.sum[row]), b);
      into.sum[row] = Lanes::first(Lanes::fma(Lanes::set1(into.sum[row]), a, sum));
      into.largest[row] = largest;
      for (int64_t d = row * padded; d < (row + 1) * padded; d += kLanes) {
        const Vec mix = Lanes::mul(Lanes::load(from.mix + d), b);
        Lanes::store(into.mix + d, Lanes::fma(Lanes::load(into.mix + d), a, mix));
      }
    }
  }
};

}  // namespace
}  // namespace bitnet
