// Splits a call of attention into work items, prepares their rows, and merges their partial results.

#include "attention.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "kv_cache.h"
#include "threads.h"

namespace bitnet {
namespace {

constexpr float kNegInf = -std::numeric_limits<float>::infinity();
// Rows of a block: their q, scores and mixes (256 KiB at 128 channels) and a block of keys fit into a second-level
// cache, and a key is converted once for all of them.
constexpr int64_t kBlockRows = 128;
constexpr std::align_val_t kCacheLine{64};

int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// Floats aligned to a cache line.
struct Free {
  void operator()(float* floats) const { ::operator delete[](floats, kCacheLine); }
};
using Floats = std::unique_ptr<float[], Free>;
Floats allocate(int64_t count) {
  return Floats(static_cast<float*>(::operator new[](sizeof(float) * count, kCacheLine)));
}

// The queries [token, token + tokens) of one sequence that read one kv head. A row is a query: all heads of the
// group of a token, then the next token; rows of zeros without any key fill the last tile.
struct Block {
  int64_t sequence, kv_head, token, tokens, rows;
};

// All blocks of a call. Neighbours differ in the kv head: they read the same pages of the cache.
struct Blocks {
  int64_t group, all_tokens, tokens, per_head, kv_heads, count;

  explicit Blocks(const AttentionProblem& p) : group(p.group()), all_tokens(p.tokens), kv_heads(p.kv_heads) {
    tokens = std::min(p.tokens, std::max<int64_t>(1, kBlockRows / group));
    per_head = (p.tokens + tokens - 1) / tokens;
    count = p.batch * per_head * kv_heads;
  }
  int64_t rows(int64_t of_tokens) const { return round_up(of_tokens * group, kTileRows); }
  Block at(int64_t i) const {
    const int64_t token = i / kv_heads % per_head * tokens, some = std::min(tokens, all_tokens - token);
    return {i / kv_heads / per_head, i % kv_heads, token, some, rows(some)};
  }
};

int64_t partial_floats(int64_t rows, int64_t padded) { return rows * padded + round_up(2 * rows, kChannelStep); }

Partial partial_at(float* floats, int64_t rows, int64_t padded) {
  return {floats + rows * padded, floats + rows * padded + rows, floats};
}

// The buffers of a thread for a block, reused for the next one.
struct Workspace {
  float *q, *scores, *keys, *k_scale, *v_scale, *hidden, *total, *chunk;
  KeyRange* range;

  Workspace(int64_t rows, int64_t tokens, int64_t padded) {
    thread_local Floats floats;
    thread_local int64_t held = 0;
    const int64_t partial = partial_floats(rows, padded);
    const int64_t ranges = round_up(rows * sizeof(KeyRange) / sizeof(float), kChannelStep);
    const int64_t sizes[] = {rows * padded, rows * kChunkKeys, kBlockKeys * padded, kChunkKeys, kChunkKeys,
                             (tokens + 1) * kChunkKeys, partial, partial, ranges};
    int64_t needed = 0;
    for (int64_t size : sizes) needed += size;
    if (held < needed) {
      floats = allocate(needed);
      held = needed;
      std::memset(floats.get(), 0, sizeof(float) * needed);
    }
    float** const places[] = {&q, &scores, &keys, &k_scale, &v_scale, &hidden, &total, &chunk};
    float* next = floats.get();
    for (int64_t i = 0; i < 8; ++i) {
      *places[i] = next;
      next += sizes[i];
    }
    range = reinterpret_cast<KeyRange*>(next);
  }
};

// One block on one thread: its rows of q, and one chunk of keys after the other.
class BlockWork {
 public:
  BlockWork(const AttentionKernels& kernels, const AttentionProblem& p, const Blocks& blocks, int64_t index)
      : kernels_(kernels),
        p_(p),
        block_(blocks.at(index)),
        work_(blocks.rows(blocks.tokens), blocks.tokens, p.padded()) {
    const int64_t padded = p.padded(), real = block_.tokens * p.group();
    for (int64_t row = 0; row < block_.rows; ++row) {
      float* to = work_.q + row * padded;
      const int64_t size = row < real ? p.head_size : 0;
      const float* from = p.q + query(row) * p.head_size;
      if (p.angles != nullptr && size > 0) {
        rotate(from, p.angles + query(row) / p.heads * p.head_size, size, to);
        from = to;
      }
      for (int64_t d = 0; d < size; ++d) to[d] = from[d] * p.scale;
      std::fill(to + size, to + padded, 0.0f);
    }
  }

  Partial total() { return partial_at(work_.total, block_.rows, p_.padded()); }
  Partial part() { return partial_at(work_.chunk, block_.rows, p_.padded()); }

  static void clear(const Partial& partial, int64_t rows, int64_t padded) {
    std::fill_n(partial.largest, rows, kNegInf);
    std::fill_n(partial.sum, rows, 0.0f);
    std::fill_n(partial.mix, rows * padded, 0.0f);
  }

  // The attention of the rows over one chunk, into out; false if none of them attends to a key of it.
  bool attend_chunk(int64_t chunk, const Partial& out) {
    const int64_t first = chunk * kChunkKeys, keys = std::min(kChunkKeys, p_.length - first);
    if (!find_key_ranges(first, keys)) return false;
    const int64_t stride = p_.kv_heads * p_.head_size, token = p_.cache_row(block_.sequence) * p_.room + first;
    const int64_t bytes = p_.type == KvType::kFloat32 ? 4 : p_.type == KvType::kBfloat16 ? 2 : 1;
    const int64_t offset = (token * stride + block_.kv_head * p_.head_size) * bytes;
    const bool scaled = p_.type == KvType::kInt8;
    for (int64_t i = 0; scaled && i < kChunkKeys; ++i) {
      const int64_t scale = (token + std::min(i, keys - 1)) * p_.kv_heads + block_.kv_head;
      work_.k_scale[i] = p_.k_scale[scale];
      work_.v_scale[i] = p_.v_scale[scale];
    }
    kernels_.chunk({p_.type, static_cast<const char*>(p_.k) + offset, static_cast<const char*>(p_.v) + offset, stride,
                    scaled ? work_.k_scale : nullptr, scaled ? work_.v_scale : nullptr, keys, p_.head_size,
                    p_.padded(), block_.rows, work_.q, work_.range, work_.scores, work_.keys},
                   out);
    return true;
  }

  void merge(const Partial& into, const Partial& from) { kernels_.merge(into, from, block_.rows, p_.padded()); }

  // out = mix * (1 / sum), or 0 for a query without any key.
  void write(const Partial& total) const {
    for (int64_t row = 0; row < block_.tokens * p_.group(); ++row) {
      float* out = p_.out + query(row) * p_.head_size;
      const float* mix = total.mix + row * p_.padded();
      const bool any = total.largest[row] != kNegInf;
      for (int64_t d = 0; d < p_.head_size; ++d) out[d] = any ? mix[d] / total.sum[row] : 0.0f;
    }
  }

  const Block& block() const { return block_; }

 private:
  // The index of a row among all queries [batch, tokens, heads].
  int64_t query(int64_t row) const {
    const int64_t group = p_.group(), token = block_.sequence * p_.tokens + block_.token + row / group;
    return token * p_.heads + block_.kv_head * group + row % group;
  }

  bool find_key_ranges(int64_t first, int64_t keys) {
    bool any = false;
    const int64_t group = p_.group();
    for (int64_t t = 0; t <= block_.tokens; ++t) {
      float* hidden = work_.hidden + t * kChunkKeys;
      int64_t begin = 0, end = 0, seen = 0;
      if (t < block_.tokens) {  // else the rows that fill the last tile
        const uint8_t* visible = p_.visible + (block_.sequence * p_.tokens + block_.token + t) * p_.room + first;
        seen = keys;
        for (int64_t i = 0; i < keys; ++i) hidden[i] = static_cast<float>(visible[i]) - 1.0f;
        if (const void* found = std::memchr(visible, 1, keys)) {
          begin = static_cast<const uint8_t*>(found) - visible;
          for (end = keys; !visible[end - 1];) --end;
        }
      }
      std::fill(hidden + seen, hidden + kChunkKeys, -1.0f);
      any = any || begin < end;
      const int64_t rows = t < block_.tokens ? (t + 1) * group : block_.rows;
      for (int64_t row = t * group; row < rows; ++row) work_.range[row] = {hidden, begin < end ? begin : keys, end};
    }
    return any;
  }

  const AttentionKernels& kernels_;
  const AttentionProblem& p_;
  const Block block_;
  Workspace work_;
};

}  // namespace

void attend(const AttentionKernels& kernels, const AttentionProblem& p) {
  const Blocks blocks(p);
  const int64_t chunks = (p.length + kChunkKeys - 1) / kChunkKeys, padded = p.padded();
  if (chunks == 1 || blocks.count >= 4 * thread_count()) {
    parallel_for(blocks.count, [&](int64_t i) {
      BlockWork work(kernels, p, blocks, i);
      const Partial total = work.total();
      BlockWork::clear(total, work.block().rows, padded);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        if (work.attend_chunk(chunk, work.part())) work.merge(total, work.part());
      }
      work.write(total);
    });
    return;
  }
  // Few queries and many keys: a chunk is a work item, and the partial results are kept until all are complete.
  const int64_t size = partial_floats(blocks.rows(blocks.tokens), padded);
  const Floats found = allocate(blocks.count * chunks * size);
  const auto partial = [&](const Block& block, int64_t i, int64_t chunk) {
    return partial_at(found.get() + (i * chunks + chunk) * size, block.rows, padded);
  };
  parallel_for(chunks * blocks.count, [&](int64_t item) {
    const int64_t i = item % blocks.count, chunk = item / blocks.count;
    BlockWork work(kernels, p, blocks, i);
    const Partial out = partial(work.block(), i, chunk);
    if (!work.attend_chunk(chunk, out)) std::fill_n(out.largest, work.block().rows, kNegInf);
  });
  parallel_for(blocks.count, [&](int64_t i) {
    BlockWork work(kernels, p, blocks, i);
    const Partial total = work.total();
    BlockWork::clear(total, work.block().rows, padded);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) work.merge(total, partial(work.block(), i, chunk));
    work.write(total);
  });
}

}  // namespace bitnet
