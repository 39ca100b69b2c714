#include "attention_gradient.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "divide.h"
#include "float_mode.h"
#include "threads.h"

namespace bitnet {
namespace {

constexpr int64_t kBlockRows = 48;  // queries at a time: whole tiles of every instruction set

// The keys [begin, end) that a query sees, with hidden ones among them or without.
struct Range {
  int64_t begin, end;
  bool holes;
};

Range range_of(const uint8_t* visible, int64_t keys) {
  const auto* first = static_cast<const uint8_t*>(std::memchr(visible, 1, keys));
  if (first == nullptr) return {0, 0, false};
  const int64_t begin = first - visible;
  int64_t end = keys;
  while (visible[end - 1] == 0) --end;
  return {begin, end, std::memchr(first, 0, end - begin) != nullptr};
}

// Everything that one thread needs for the heads that share keys and values.
class Head {
 public:
  Head(const AttentionGradientKernels& rows, const FloatMatmulKernels& products, const AttentionGradient& p)
      : rows_(rows), products_(products), p_(p), size_(p.head_size), width_(round_up(size_, products.columns)),
        keys_(round_up(p.keys, products.rows * products.columns)) {
    for (auto* panels : {&k_scores_, &v_scores_}) panels->assign(keys_ * size_, 0.0f);
    k_mixed_.assign(keys_ * width_, 0.0f);
    // A block's first key is not the first of a tile of rows, so its last tile may reach behind all keys.
    for (auto* sums : {&dk_, &dv_}) sums->assign((keys_ + products.rows) * width_, 0.0f);
    for (auto* block : {&q_, &dout_}) block->resize(kBlockRows * size_);
    for (auto* block : {&q_panels_, &dout_panels_, &dq_}) block->resize(kBlockRows * width_);
    for (auto* block : {&p_block_, &dp_block_}) block->resize(kBlockRows * keys_);
  }

  void run(int64_t batch, int64_t kv_head, const Range* ranges) {
    const int64_t stride = p_.kv_heads * size_, first = (batch * p_.keys * p_.kv_heads + kv_head) * size_;
    pack_keys(p_.k + first, stride, k_scores_);
    pack_keys(p_.v + first, stride, v_scores_);
    const FloatsOrCodes transposed = {{p_.k + first, 1, stride}, {}};  // [channels / columns][keys][columns]
    products_.pack_columns(transposed, 0, size_, 0, p_.keys, k_mixed_.data(), products_.columns * keys_);
    for (auto* sums : {&dk_, &dv_}) std::fill(sums->begin(), sums->end(), 0.0f);
    for (int64_t head = kv_head * group(); head < (kv_head + 1) * group(); ++head) {
      for (int64_t t = 0; t < p_.tokens; t += kBlockRows) block(batch, head, t, ranges);
    }
    for (int64_t s = 0; s < p_.keys; ++s) {
      std::copy_n(dk_.data() + s * width_, size_, p_.dk + first + s * stride);
      std::copy_n(dv_.data() + s * width_, size_, p_.dv + first + s * stride);
    }
  }

 private:
  int64_t group() const { return p_.heads / p_.kv_heads; }

  // [keys / columns][channels][columns], for products over channels.
  void pack_keys(const float* from, int64_t stride, std::vector<float>& to) {
    products_.pack_columns({{from, stride, 1}, {}}, 0, p_.keys, 0, size_, to.data(), products_.columns * size_);
  }

  // c[rows, columns of a panel] (add: +)= a b for tiles of rows, in chains of kChain.
  void multiply(int64_t rows, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t k, float* c,
                int64_t c_stride, bool add) const {
    for (int64_t r = 0; r < rows; r += products_.rows) {
      for (int64_t i = 0; i < k; i += kChain) {
        products_.tile(a + r * a_row + i * a_step, a_row, a_step, b + i * products_.columns, std::min(kChain, k - i),
                       c + r * c_stride, c_stride, add || i > 0);
      }
    }
  }

  // Rows of q or dout, as they are and as [channels / columns][rows][columns]; zeros behind the last.
  void copy_rows(const float* from, int64_t stride, int64_t rows, std::vector<float>& to, std::vector<float>& panels) const {
    std::fill(panels.begin(), panels.end(), 0.0f);
    for (int64_t r = 0; r < kBlockRows; ++r) {
      float* row = to.data() + r * size_;
      if (r >= rows) {
        std::fill_n(row, size_, 0.0f);
        continue;
      }
      std::copy_n(from + r * stride, size_, row);
      for (int64_t d = 0; d < size_; d += products_.columns) {
        std::copy_n(row + d, std::min(products_.columns, size_ - d), panels.data() + d * kBlockRows + r * products_.columns);
      }
    }
  }

  void block(int64_t batch, int64_t head, int64_t t, const Range* ranges) {
    const int64_t rows = std::min(kBlockRows, p_.tokens - t), stride = p_.heads * size_;
    const int64_t columns = products_.columns, tiled = round_up(rows, products_.rows);
    const int64_t first = ((batch * p_.tokens + t) * p_.heads + head) * size_;
    int64_t begin = p_.keys, end = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const Range& range = ranges[batch * p_.tokens + t + r];
      if (range.begin == range.end) continue;
      begin = std::min(begin, range.begin), end = std::max(end, range.end);
    }
    if (end == 0) {
      for (int64_t r = 0; r < rows; ++r) std::fill_n(p_.dq + first + r * stride, size_, 0.0f);
      return;
    }
    begin = begin / columns * columns;
    const int64_t seen = round_up(end - begin, columns);
    copy_rows(p_.q + first, stride, rows, q_, q_panels_);
    copy_rows(p_.dout + first, stride, rows, dout_, dout_panels_);
    float* const probabilities = p_block_.data();
    float* const gradients = dp_block_.data();
    for (int64_t s = 0; s < seen; s += columns) {
      multiply(tiled, q_.data(), size_, 1, k_scores_.data() + (begin + s) * size_, size_, probabilities + s, keys_, false);
      multiply(tiled, dout_.data(), size_, 1, v_scores_.data() + (begin + s) * size_, size_, gradients + s, keys_, false);
    }
    for (int64_t r = 0; r < tiled; ++r) {
      float* const row = probabilities + r * keys_;
      const Range range = r < rows ? ranges[batch * p_.tokens + t + r] : Range{0, 0, false};
      if (range.begin == range.end) {
        std::fill_n(row, seen, 0.0f);
        std::fill_n(gradients + r * keys_, seen, 0.0f);
        continue;
      }
      const uint8_t* visible = p_.visible + (batch * p_.tokens + t + r) * p_.keys + begin;
      rows_.softmax(row, seen, range.begin - begin, range.end - begin, range.holes ? visible : nullptr, p_.scale);
      rows_.gradient(row, gradients + r * keys_, seen, p_.scale);
    }
    for (int64_t d = 0; d < width_; d += columns) {
      multiply(tiled, gradients, keys_, 1, k_mixed_.data() + d * keys_ + begin * columns, seen, dq_.data() + d, width_, false);
      // A tile may reach behind the keys that are seen, where the block holds another one's numbers.
      const int64_t whole = seen / products_.rows * products_.rows;
      transposed(whole, 0, tiled, d, begin);
      if (whole < seen) transposed_rest(whole, seen - whole, tiled, d, begin);
    }
    for (int64_t r = 0; r < rows; ++r) std::copy_n(dq_.data() + r * width_, size_, p_.dq + first + r * stride);
  }

  // Adds to rows of dk and dv, [begin + s, begin + s + count), the products over the queries of a block.
  void transposed(int64_t count, int64_t s, int64_t queries, int64_t d, int64_t begin) {
    multiply(count, dp_block_.data() + s, 1, keys_, q_panels_.data() + d * kBlockRows, queries,
             dk_.data() + (begin + s) * width_ + d, width_, true);
    multiply(count, p_block_.data() + s, 1, keys_, dout_panels_.data() + d * kBlockRows, queries,
             dv_.data() + (begin + s) * width_ + d, width_, true);
  }

  // The same for fewer rows than a tile has: the numbers behind them are zeroed first.
  void transposed_rest(int64_t s, int64_t rest, int64_t queries, int64_t d, int64_t begin) {
    const int64_t behind = std::min(products_.rows, keys_ - s) - rest;
    for (auto* block : {&p_block_, &dp_block_}) {
      for (int64_t r = 0; r < queries; ++r) std::fill_n(block->data() + r * keys_ + s + rest, behind, 0.0f);
    }
    transposed(products_.rows, s, queries, d, begin);
  }

  const AttentionGradientKernels& rows_;
  const FloatMatmulKernels& products_;
  const AttentionGradient& p_;
  const int64_t size_, width_, keys_;  // channels, those of whole vectors, keys of whole tiles
  std::vector<float> k_scores_, v_scores_, k_mixed_, dk_, dv_;
  std::vector<float> q_, dout_, q_panels_, dout_panels_, dq_, p_block_, dp_block_;
};

}  // namespace

void attention_gradient(const AttentionGradientKernels& rows, const FloatMatmulKernels& products,
                        const AttentionGradient& p) {
  std::vector<Range> ranges(p.batch * p.tokens);
  for (int64_t i = 0; i < p.batch * p.tokens; ++i) ranges[i] = range_of(p.visible + i * p.keys, p.keys);
  const uint64_t mode = FloatMode::current();
  parallel_for(p.batch * p.kv_heads, [&](int64_t item) {
    const FloatMode as_caller(mode);
    Head(rows, products, p).run(item / p.kv_heads, item % p.kv_heads, ranges.data());
  });
}

}  // namespace bitnet
