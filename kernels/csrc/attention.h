// Softmax attention of a few or many queries over a cache of keys and values, on raw pointers.
//
// The arithmetic of one query is fixed, so its bits depend neither on the instruction set, nor on the threads, nor on
// which other queries are computed beside it:
//   keys      chunks of kChunkKeys, beginning at multiples of it;
//   scores    q.k in 4 lanes (channels i, i + 4, ..), each a chain of fused multiply-adds, then (0 + 2) + (1 + 3);
//   chunk     p = exp(score - largest), sum of p in 16 lanes and a tree of halves, mix = a chain of p v over its keys;
//   chunks    merged in order into (largest, sum, mix), each side scaled by exp(its largest - the larger one).
// Chunks are independent of each other, so they can be computed by any thread and merged later.

#ifndef BITNET_KERNELS_ATTENTION_H_
#define BITNET_KERNELS_ATTENTION_H_

#include <algorithm>
#include <cstdint>

namespace bitnet {

constexpr int64_t kChunkKeys = 128;
constexpr int64_t kChannelStep = 16;  // channels are padded to a multiple of it: whole vectors (float_lanes.h)
constexpr int64_t kTileRows = 4;    // rows of q are padded to a multiple of it
constexpr int64_t kBlockKeys = 64;  // values that are converted at once: 32 KiB at 128 channels

enum class KvType { kFloat32, kBfloat16, kInt8 };

// One call. Layouts as in bitnet_kernels/attention.py.
struct AttentionProblem {
  int64_t batch, tokens, heads, kv_heads, head_size, room;
  int64_t length;  // positions that are written, at most room
  float scale;
  KvType type;
  const float* q;          // [batch, tokens, heads, head_size]
  const void* k;           // [cache_rows, room, kv_heads, head_size]
  const void* v;           // the same
  const float* k_scale;    // [cache_rows, room, kv_heads] for int8, else null
  const float* v_scale;    // the same
  const uint8_t* visible;  // [batch, tokens, room], 0 or 1
  const float* angles;     // [batch, tokens, head_size], by which q is rotated first (kv_cache.h); null for none
  float* out;              // [batch, tokens, heads, head_size]
  const int32_t* rows;     // [batch], the row of the cache of each sequence; null: sequence i has row i
  int64_t cache_rows;      // batch, if rows is null

  int64_t group() const { return heads / kv_heads; }
  int64_t cache_row(int64_t sequence) const {
    return rows == nullptr ? sequence : std::clamp<int64_t>(rows[sequence], 0, cache_rows - 1);
  }
  int64_t padded() const { return (head_size + kChannelStep - 1) / kChannelStep * kChannelStep; }
};

// The softmax state of some rows over the keys so far: the largest score (-inf: no key), the sum of p, and the mix, the
// sum of p times the values.
struct Partial {
  float* largest;  // [rows]
  float* sum;      // [rows]
  float* mix;      // [rows, padded]
};

// The keys of a chunk that a query attends to: those of [begin, end) whose `hidden` is 0.
struct KeyRange {
  const float* hidden;  // [kChunkKeys], 0 or -1
  int64_t begin, end;
};

// Some rows, the queries of one kv head, against the keys of one chunk.
struct ChunkProblem {
  KvType type;
  const void* k;  // the first key of the chunk
  const void* v;
  int64_t stride;        // elements from a key to the next
  const float* k_scale;  // [kChunkKeys] for int8, else null
  const float* v_scale;
  int64_t keys;
  int64_t head_size, padded;
  int64_t rows;        // a multiple of kTileRows
  const float* q;      // [rows, padded], times the scale of the scores, zeros behind head_size
  const KeyRange* range;  // [rows]
  float* scores;       // [rows, kChunkKeys], overwritten
  float* block;        // [kBlockKeys, padded], overwritten
};

// The loops of one instruction family.
struct AttentionKernels {
  void (*chunk)(const ChunkProblem&, const Partial& out);
  void (*merge)(const Partial& into, const Partial& from, int64_t rows, int64_t padded);
};

// Writes out for all queries, on all threads.
void attend(const AttentionKernels& kernels, const AttentionProblem& p);

}  // namespace bitnet

#endif  // BITNET_KERNELS_ATTENTION_H_
