// The loops of attention.h, for any Lanes (float_lanes.h) with the tile shapes
//
//   kScoreRows     rows of a tile of scores
//   kMixVectors    vectors of a tile of weighted sums of values

#ifndef BITNET_KERNELS_ATTENTION_LOOPS_H_
#define BITNET_KERNELS_ATTENTION_LOOPS_H_

#include <cstring>
#include <limits>

#include "attention.h"
#include "float_lanes.h"

namespace bitnet {
namespace {

static_assert(kChannelStep == kLanes);

template <typename Lanes>
struct AttentionLoops {
  using Vec = typename Lanes::Vec;
  static constexpr int64_t kAhead = 32;  // prefetch distance in keys
  static constexpr float kNegInf = -std::numeric_limits<float>::infinity();

  // exp(x) for x <= 0, relative error below 2^-23, by Cephes' polynomial. Results below exp(-60) = 2^-86 become 0: they
  // are negligible beside the weight of 1, and products with them would be slow subnormal numbers. NaN stays NaN: y - y
  // is NaN then.
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
    const Vec power = Lanes::add(Lanes::add_to_exponent(y, t), Lanes::sub(y, y));
    return Lanes::select_less(x, Lanes::set1(-60.0f), Lanes::set1(0.0f), power);
  }

  template <KvType kType>
  BITNET_INLINE static const void* element(const void* data, int64_t i) {
    constexpr int64_t kBytes = kType == KvType::kFloat32 ? 4 : kType == KvType::kBfloat16 ? 2 : 1;
    return static_cast<const char*>(data) + i * kBytes;
  }

  template <KvType kType>
  BITNET_INLINE static float load1(const void* data, int64_t i) {
    if (kType == KvType::kFloat32) return static_cast<const float*>(data)[i];
    if (kType == KvType::kInt8) return static_cast<const int8_t*>(data)[i];
    const uint32_t bits = uint32_t{static_cast<const uint16_t*>(data)[i]} << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }

  template <KvType kType>
  BITNET_INLINE static Vec load(const void* data, int64_t i) {
    if (kType == KvType::kFloat32) return Lanes::load(static_cast<const float*>(data) + i);
    if (kType == KvType::kBfloat16) return Lanes::load_bfloat16(static_cast<const uint16_t*>(data) + i);
    return Lanes::load_int8(static_cast<const int8_t*>(data) + i);
  }

  // Channels [d, d + 16) of a key or value, zeros behind the last channel.
  template <KvType kType>
  BITNET_INLINE static Vec channels(const void* data, int64_t d, int64_t head_size) {
    if (d + kLanes <= head_size) return load<kType>(data, d);
    float some[kLanes] = {};
    for (int64_t i = 0; d + i < head_size; ++i) some[i] = load1<kType>(data, d + i);
    return Lanes::load(some);
  }

  template <KvType kType>
  BITNET_INLINE static void prefetch(const void* data, int64_t elements) {
    const char* end = static_cast<const char*>(element<kType>(data, elements));
    for (const char* line = static_cast<const char*>(data); line < end; line += 64) __builtin_prefetch(line);
  }

  // Few rows are limited by memory: they read the values in place, kAhead keys ahead. Many rows share converted blocks.
  BITNET_INLINE static bool few_rows(const ChunkProblem& p) {
    return p.head_size == p.padded && p.rows <= 2 * kTileRows;
  }

  // The keys of [first, last) that some row of a tile attends to, as [begin, end).
  BITNET_INLINE static void clip(const ChunkProblem& p, int64_t row, int64_t rows, int64_t first, int64_t last,
                                 int64_t& begin, int64_t& end) {
    begin = last, end = first;
    for (int64_t r = row; r < row + rows; ++r) {
      if (p.range[r].begin < begin) begin = p.range[r].begin;
      if (p.range[r].end > end) end = p.range[r].end;
    }
    begin = begin < first ? first : begin;
    end = end > last ? last : end;
  }

  // Scores of 16 keys at a time. Four keys share a vector: quarter b of vector c of a step holds four channels of key
  // c + 4 b, so that sum4 gives the 16 scores of a row in order.
  struct Score {
    static constexpr int64_t kRows = Lanes::kScoreRows, kKeys = kBlockKeys / 2;

    // The block as [16 keys][channels / 4][c][b][4]. The last key stands for those behind it.
    template <KvType kType>
    BITNET_TARGET static void convert(const ChunkProblem& p, int64_t first, int64_t last) {
      const int64_t size = p.head_size, padded = p.padded, ahead = few_rows(p) ? size : 0;
      for (int64_t tile = first; tile < last; tile += kLanes) {
        float* to = p.block + (tile - first) * padded;
        for (int64_t c = 0; c < 4; ++c, to += kLanes) {
          const void* key[4];
          BITNET_UNROLL
          for (int b = 0; b < 4; ++b) {
            const int64_t i = tile + c + 4 * b < last ? tile + c + 4 * b : last - 1;
            key[b] = element<kType>(p.k, i * p.stride);
            prefetch<kType>(element<kType>(key[b], kAhead * p.stride), ahead);
          }
          for (int64_t d = 0; d < padded; d += kLanes) {
            Vec x[4];
            BITNET_UNROLL
            for (int b = 0; b < 4; ++b) x[b] = channels<kType>(key[b], d, size);
            Lanes::transpose(x);
            BITNET_UNROLL
            for (int j = 0; j < 4; ++j) Lanes::store(to + (d + 4 * j) * kLanes, x[j]);
          }
        }
      }
    }

    BITNET_INLINE static void tile(const float* q, int64_t padded, const float* keys, float* scores) {
      constexpr int R = kRows;
      constexpr int64_t kWidth = kLanes / Lanes::kParts;
      for (int64_t part = 0; part < kLanes; part += kWidth) {
        typename Lanes::Part sums[R * 4];
        BITNET_UNROLL
        for (int i = 0; i < R * 4; ++i) sums[i] = Lanes::set1_part(0.0f);
        for (int64_t d = 0; d < padded; d += 4) {
          typename Lanes::Part key[4];
          BITNET_UNROLL
          for (int c = 0; c < 4; ++c) key[c] = Lanes::load_part(keys + (d + c) * kLanes + part);
          BITNET_UNROLL
          for (int r = 0; r < R; ++r) {
            const typename Lanes::Part row = Lanes::repeat4(q + r * padded + d);
            BITNET_UNROLL
            for (int c = 0; c < 4; ++c) sums[r * 4 + c] = Lanes::fma_part(row, key[c], sums[r * 4 + c]);
          }
        }
        BITNET_UNROLL
        for (int r = 0; r < R; ++r) Lanes::store_part(scores + r * kChunkKeys + part, Lanes::sum4(sums + 4 * r));
      }
    }

    template <KvType kType>
    BITNET_INLINE static void rows(const ChunkProblem& p, const Partial&, int64_t row, int64_t first, int64_t begin,
                                   int64_t end) {
      for (int64_t key = begin / kLanes * kLanes; key < end; key += kLanes) {
        const float* keys = p.block + (key - first) * p.padded;
        tile(p.q + row * p.padded, p.padded, keys, p.scores + row * kChunkKeys + key);
      }
    }
  };

  // mix += sum over keys of weight * value, for kTileRows rows and some vectors of channels at a time.
  struct Mix {
    static constexpr int64_t kRows = kTileRows, kKeys = kBlockKeys;

    // The block as [keys][channels], for many rows.
    template <KvType kType>
    BITNET_TARGET static void convert(const ChunkProblem& p, int64_t first, int64_t last) {
      if (few_rows(p)) return;
      const int64_t size = p.head_size, padded = p.padded;
      for (int64_t key = first; key < last; ++key) {
        const void* value = element<kType>(p.v, key * p.stride);
        float* to = p.block + (key - first) * padded;
        for (int64_t d = 0; d < padded; d += kLanes) Lanes::store(to + d, channels<kType>(value, d, size));
      }
    }

    // V vectors of channels; prefetches the values `ahead` elements away, if that is not 0.
    template <KvType kType, int V>
    BITNET_INLINE static void tile(const float* weights, const void* data, int64_t stride, int64_t ahead, int64_t keys,
                                   float* mix, int64_t padded) {
      Vec sums[kTileRows * V];
      BITNET_UNROLL
      for (int i = 0; i < kTileRows * V; ++i) sums[i] = Lanes::load(mix + i / V * padded + i % V * kLanes);
      for (int64_t key = 0; key < keys; ++key) {
        const void* value = element<kType>(data, key * stride);
        if (ahead != 0) prefetch<kType>(element<kType>(value, ahead), V * kLanes);
        Vec values[V];
        BITNET_UNROLL
        for (int i = 0; i < V; ++i) values[i] = load<kType>(value, i * kLanes);
        BITNET_UNROLL
        for (int r = 0; r < kTileRows; ++r) {
          const Vec weight = Lanes::set1(weights[r * kChunkKeys + key]);
          BITNET_UNROLL
          for (int i = 0; i < V; ++i) sums[r * V + i] = Lanes::fma(weight, values[i], sums[r * V + i]);
        }
      }
      BITNET_UNROLL
      for (int i = 0; i < kTileRows * V; ++i) Lanes::store(mix + i / V * padded + i % V * kLanes, sums[i]);
    }

    template <KvType kType>
    BITNET_INLINE static void tiles(const ChunkProblem& p, const Partial& out, int64_t row, const void* data,
                                    int64_t stride, int64_t ahead, int64_t begin, int64_t end) {
      constexpr int V = Lanes::kMixVectors;
      const float* weights = p.scores + row * kChunkKeys + begin;
      float* mix = out.mix + row * p.padded;
      int64_t d = 0;
      for (; d + V * kLanes <= p.padded; d += V * kLanes) {
        tile<kType, V>(weights, element<kType>(data, d), stride, ahead, end - begin, mix + d, p.padded);
      }
      for (; d < p.padded; d += kLanes) {
        tile<kType, 1>(weights, element<kType>(data, d), stride, ahead, end - begin, mix + d, p.padded);
      }
    }

    template <KvType kType>
    BITNET_INLINE static void rows(const ChunkProblem& p, const Partial& out, int64_t row, int64_t first,
                                   int64_t begin, int64_t end) {
      if (few_rows(p)) {
        const void* values = element<kType>(p.v, begin * p.stride);
        tiles<kType>(p, out, row, values, p.stride, row == 0 ? kAhead * p.stride : 0, begin, end);
      } else {
        const float* values = p.block + (begin - first) * p.padded;
        tiles<KvType::kFloat32>(p, out, row, values, p.padded, 0, begin, end);
      }
    }
  };

  // Runs Work over the keys or values (`data`) that each tile of rows attends to, block by block: all rows use a
  // block while it is in the first-level cache and the next one is prefetched.
  template <KvType kType, typename Work>
  BITNET_TARGET static void for_blocks(const ChunkProblem& p, const void* data, const Partial& out) {
    constexpr int64_t K = Work::kKeys;
    for (int64_t first = 0; first < p.keys; first += K) {
      const int64_t last = first + K < p.keys ? first + K : p.keys;
      int64_t begin, end;
      clip(p, 0, p.rows, first, last, begin, end);
      if (begin >= end) continue;
      Work::template convert<kType>(p, first, last);
      int64_t prefetched = few_rows(p) ? last + K : last;
      for (int64_t row = 0; row < p.rows; row += Work::kRows) {
        for (; prefetched < last + K * (row + Work::kRows) / p.rows; ++prefetched) {
          prefetch<kType>(element<kType>(data, prefetched * p.stride), p.head_size);
        }
        clip(p, row, Work::kRows, first, last, begin, end);
        if (begin < end) Work::template rows<kType>(p, out, row, first, begin, end);
      }
    }
  }

  // scores = exp(scores - largest), times the scales of the values, and the largest and the sum of a row.
  //
  // The largest is a number whatever the scores are: a NaN among them reaches the sum through its own weight.
  BITNET_TARGET static void softmax_row(const ChunkProblem& p, int64_t row, const Partial& out) {
    const KeyRange& range = p.range[row];
    float* scores = p.scores + row * kChunkKeys;
    const Vec zero = Lanes::set1(0.0f), neg_inf = Lanes::set1(kNegInf);
    if (range.begin >= range.end) {
      out.largest[row] = kNegInf;
      out.sum[row] = 0.0f;
      for (int64_t i = 0; i < kChunkKeys; i += kLanes) Lanes::store(scores + i, zero);
      return;
    }
    Vec largest = Lanes::set1(std::numeric_limits<float>::lowest());
    for (int64_t i = 0; i < kChunkKeys; i += kLanes) {
      Vec s = Lanes::load(scores + i);
      if (p.k_scale != nullptr) s = Lanes::mul(s, Lanes::load(p.k_scale + i));
      s = Lanes::select_less(Lanes::load(range.hidden + i), zero, neg_inf, s);
      Lanes::store(scores + i, s);
      largest = Lanes::max(s, largest);  // in this order: the second where s is NaN
    }
    out.largest[row] = Lanes::max_of(largest);
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

  template <KvType kType>
  BITNET_TARGET static void chunk_of(const ChunkProblem& p, const Partial& out) {
    for_blocks<kType, Score>(p, p.k, out);
    for (int64_t row = 0; row < p.rows; ++row) softmax_row(p, row, out);
    std::memset(out.mix, 0, sizeof(float) * p.rows * p.padded);
    for_blocks<kType, Mix>(p, p.v, out);
    for (int64_t row = 0; row < p.rows; ++row) {
      if (!finite(out.mix + row * p.padded, p.padded)) mix_visible<kType>(p, row, out);
    }
  }

  BITNET_INLINE static bool finite(const float* x, int64_t size) {
    Vec sum = Lanes::set1(0.0f);
    for (int64_t d = 0; d < size; d += kLanes) {
      const Vec some = Lanes::load(x + d);
      sum = Lanes::add(sum, Lanes::sub(some, some));
    }
    return Lanes::sum_of(sum) == 0.0f;
  }

  // The mix of one row again, key by key without the hidden ones: their weight of 0 times NaN or infinity is NaN.
  template <KvType kType>
  BITNET_TARGET static void mix_visible(const ChunkProblem& p, int64_t row, const Partial& out) {
    const KeyRange& range = p.range[row];
    for (int64_t d = 0; d < p.padded; d += kLanes) {
      Vec sum = Lanes::set1(0.0f);
      for (int64_t key = range.begin; key < range.end; ++key) {
        if (range.hidden[key] != 0.0f) continue;
        const Vec value = channels<kType>(element<kType>(p.v, key * p.stride), d, p.head_size);
        sum = Lanes::fma(Lanes::set1(p.scores[row * kChunkKeys + key]), value, sum);
      }
      Lanes::store(out.mix + row * p.padded + d, sum);
    }
  }

  BITNET_TARGET static void chunk(const ChunkProblem& p, const Partial& out) {
    if (p.type == KvType::kFloat32) return chunk_of<KvType::kFloat32>(p, out);
    if (p.type == KvType::kBfloat16) return chunk_of<KvType::kBfloat16>(p, out);
    return chunk_of<KvType::kInt8>(p, out);
  }

  BITNET_TARGET static void merge(const Partial& into, const Partial& from, int64_t rows, int64_t padded) {
    for (int64_t row = 0; row < rows; ++row) {
      if (from.largest[row] == kNegInf) continue;
      const float largest = into.largest[row] > from.largest[row] ? into.largest[row] : from.largest[row];
      const Vec a = exp(Lanes::set1(into.largest[row] - largest)), b = exp(Lanes::set1(from.largest[row] - largest));
      const Vec sum = Lanes::mul(Lanes::set1(from.sum[row]), b);
      into.sum[row] = Lanes::first(Lanes::fma(Lanes::set1(into.sum[row]), a, sum));
      into.largest[row] = largest;
      for (int64_t d = row * padded; d < (row + 1) * padded; d += kLanes) {
        // A tile adds 0 * v for keys that only its other rows attend to, which may turn -0 to +0: make it +0 always.
        const Vec mix = Lanes::add(Lanes::mul(Lanes::load(from.mix + d), b), Lanes::set1(0.0f));
        Lanes::store(into.mix + d, Lanes::fma(Lanes::load(into.mix + d), a, mix));
      }
    }
  }
};

}  // namespace
}  // namespace bitnet

#endif  // BITNET_KERNELS_ATTENTION_LOOPS_H_
