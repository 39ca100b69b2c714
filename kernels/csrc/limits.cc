// What the machine can do at most, for the benchmark to divide by: reading memory, and starting a parallel loop.

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>

#include "compiler.h"
#include "threads.h"

namespace bitnet {
namespace {

constexpr int64_t kReadBytes = int64_t{1} << 20;  // of a work item, a multiple of 256
constexpr std::chrono::microseconds kSpin{2};

// Reads size bytes and returns their xor, so that the compiler keeps the loads. size is a multiple of 128. Two streams,
// with lines fetched into L2 2 KiB ahead, read fastest on a Xeon; one stream, more streams, other distances and L1 were
// slower or no faster.
uint64_t read(const uint8_t* data, int64_t size) {
  constexpr int kStreams = 2, kWords = 8;
  const int64_t stream = size / kStreams;
  uint64_t words[kStreams][kWords] = {};
  for (int64_t i = 0; i < stream; i += 64) {
    for (int s = 0; s < kStreams; ++s) {
      const uint8_t* line = data + s * stream + i;
      __builtin_prefetch(line + 2048, 0, 2);
      uint64_t loaded[kWords];
      std::memcpy(loaded, line, sizeof(loaded));
      for (int j = 0; j < kWords; ++j) words[s][j] ^= loaded[j];
    }
  }
  uint64_t result = 0;
  for (int s = 0; s < kStreams; ++s) {
    for (int j = 0; j < kWords; ++j) result ^= words[s][j];
  }
  return result;
}

}  // namespace
}  // namespace bitnet

// Reads size bytes, a multiple of 256, once with all threads.
extern "C" BITNET_EXPORT uint64_t bitnet_kernels_read(const uint8_t* data, int64_t size) noexcept {
  using namespace bitnet;
  std::atomic<uint64_t> result{0};
  parallel_for((size + kReadBytes - 1) / kReadBytes, [&](int64_t i) {
    const int64_t begin = i * kReadBytes;
    result ^= read(data + begin, size - begin < kReadBytes ? size - begin : kReadBytes);
  });
  return result;
}

// Runs parallel loops in which each thread spins for two microseconds: an empty loop would be over before the helpers
// have joined it, and would measure nothing.
extern "C" BITNET_EXPORT void bitnet_kernels_fork_join(int64_t loops) noexcept {
  using namespace bitnet;
  using Clock = std::chrono::steady_clock;
  for (int64_t loop = 0; loop < loops; ++loop) {
    parallel_for(thread_count(), [](int64_t) {
      for (const auto end = Clock::now() + kSpin; Clock::now() < end;) {
      }
    });
  }
}
