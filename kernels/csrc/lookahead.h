// Which weights come next. A model that generates multiplies by the same matrices in the same order for every token, so
// the call after this one is known, and a helper that waits for it can fetch the beginning of its share into its cache:
// memory is then busy also while the caller prepares the next call. A wrong guess costs some reading and nothing else.

#ifndef BITNET_KERNELS_LOOKAHEAD_H_
#define BITNET_KERNELS_LOOKAHEAD_H_

#include <cstdint>

namespace bitnet {

// The matrices of a call, as runs of bytes in the order in which its items take them.
struct Weights {
  static constexpr int kMaxMatrices = 4;  // of one call; of more, the first are fetched
  const uint8_t* data[kMaxMatrices] = {};
  int64_t bytes[kMaxMatrices] = {};

  void add(const uint8_t* matrix, int64_t size);
  int64_t total() const;
  // Fetches lines [begin, end) of all matrices' bytes one behind the other into L2. Never faults, whatever became of
  // them.
  void prefetch(int64_t begin, int64_t end) const;
};

// Remembers that this call followed the one before, and returns what followed it the last time; empty if nothing did.
Weights expected_after(const Weights& call);

}  // namespace bitnet

#endif  // BITNET_KERNELS_LOOKAHEAD_H_
