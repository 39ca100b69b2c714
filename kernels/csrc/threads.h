// A parallel loop on somebody else's thread pool that cannot deadlock.
//
// XLA runs independent custom calls at once, each on a thread of the pool that they would like helpers from. A call
// that waits for scheduled tasks hangs when all threads wait so. Here the caller drains the shared index itself and
// waits only for items that a helper has already started; a helper that arrives late finds the index exhausted and
// touches nothing else.

#ifndef BITNET_KERNELS_THREADS_H_
#define BITNET_KERNELS_THREADS_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>

namespace bitnet {

struct ParallelLoop {
  std::function<void(int64_t)> body;
  int64_t items;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};

  void drain() {
    for (int64_t i = next.fetch_add(1); i < items; i = next.fetch_add(1)) {
      body(i);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

// Runs body(0) .. body(items - 1), the caller and up to threads - 1 helpers of the pool taking items in order.
// Pool: anything with Schedule(callable).
template <typename Pool>
void parallel_for(Pool& pool, int64_t threads, int64_t items, std::function<void(int64_t)> body) {
  auto loop = std::make_shared<ParallelLoop>();
  loop->body = std::move(body);
  loop->items = items;
  for (int64_t helper = 1; helper < std::min(threads, items); ++helper) {
    pool.Schedule([loop] { loop->drain(); });
  }
  loop->drain();
  // A helper finishes its item in microseconds; yield only in case it lost its processor.
  for (int64_t spins = 0; loop->done.load(std::memory_order_acquire) < items; ++spins) {
    if (spins > 4096) std::this_thread::yield();
  }
}

}  // namespace bitnet

#endif  // BITNET_KERNELS_THREADS_H_
