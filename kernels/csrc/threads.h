// A parallel loop on a pool of helper threads that spin while they wait for the next loop: a matrix of a decode step
// takes tens of microseconds, and waking a sleeping thread takes as long.
//
// Any thread may call it, also several at once: one caller has the helpers, another runs its loop alone. A caller
// never waits for a helper to start, so it cannot deadlock, and the result does not depend on which threads take part.
// A helper without work spins for a while, then sleeps; after a fork the child starts new helpers. Where the system
// refuses threads there are fewer helpers, or none. Nothing here is destroyed when the process ends, so loops may run
// until then.

#ifndef BITNET_KERNELS_THREADS_H_
#define BITNET_KERNELS_THREADS_H_

#include <cstdint>
#include <functional>

#include "compiler.h"
#include "lookahead.h"

namespace bitnet {

// Threads that take part in a loop, the caller among them: the processors that this process may run on when the
// first loop starts, or the number set by set_thread_count, or fewer where the system refuses threads.
int64_t thread_count();

// Runs body(0) .. body(items - 1). Each thread walks through its own run of neighbouring items, and when it is done
// takes items from the end of another's. Until the next loop, helpers fetch the beginning of their share of `next`.
// An exception of an item is thrown to the caller, the first one if there are several.
void run_parallel(int64_t items, const std::function<void(int64_t)>& body, const Weights& next);

template <typename Body>
void parallel_for(int64_t items, const Body& body, const Weights& next = Weights()) {
  run_parallel(items, std::cref(body), next);  // a reference: std::function allocates nothing for it
}

}  // namespace bitnet

// For tests and measurements: later loops use this number of threads (at least 1), or fewer where the system refuses.
extern "C" BITNET_EXPORT void bitnet_kernels_set_thread_count(int64_t count) noexcept;

#endif  // BITNET_KERNELS_THREADS_H_
