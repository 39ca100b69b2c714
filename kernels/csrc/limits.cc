// What the machine can do at most, for the benchmark to divide by: reading memory, and starting a parallel loop.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <iterator>

#include "compiler.h"
#include "processor.h"
#include "threads.h"

namespace bitnet {
namespace {

constexpr int64_t kReadBytes = int64_t{1} << 20;  // of a work item
constexpr std::chrono::microseconds kSpin{2};

#define BITNET_ALWAYS_INLINE inline __attribute__((always_inline))

// Memory is read fastest with many lines in flight, and which loop has most depends on the processor: the width of its
// loads, how many streams it walks in step, and how far ahead it fetches lines, into L1 or L2. The ceiling is the
// fastest of all these loops on the machine at hand; Python tries them (bitnet_kernels/machine.py).
enum class Cache { kL1 = 3, kL2 = 2 };  // the locality of __builtin_prefetch

// Reads size bytes, a multiple of 64 kStreams, and returns their xor, so that the compiler keeps the loads.
template <typename Vector, int kStreams, int kAhead, Cache kInto>
BITNET_ALWAYS_INLINE uint64_t read(const uint8_t* data, int64_t size) {
  constexpr int kVectors = 64 / sizeof(Vector), kWords = sizeof(Vector) / sizeof(uint64_t);
  const int64_t stream = size / kStreams;
  Vector totals[kStreams][kVectors] = {};
  for (int64_t i = 0; i < stream; i += 64) {
    BITNET_UNROLL
    for (int s = 0; s < kStreams; ++s) {
      const uint8_t* line = data + s * stream + i;
      if constexpr (kAhead > 0) __builtin_prefetch(line + kAhead, 0, static_cast<int>(kInto));
      BITNET_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        Vector loaded;
        std::memcpy(&loaded, line + v * sizeof(Vector), sizeof(Vector));
        totals[s][v] ^= loaded;
      }
    }
  }
  uint64_t result = 0;
  for (const auto& of_stream : totals) {
    for (const Vector& total : of_stream) {
      for (int word = 0; word < kWords; ++word) result ^= total[word];
    }
  }
  return result;
}

typedef uint64_t Vector16 __attribute__((vector_size(16)));

template <int kStreams, int kAhead, Cache kInto>
uint64_t read_16(const uint8_t* data, int64_t size) {
  return read<Vector16, kStreams, kAhead, kInto>(data, size);
}

#if defined(__x86_64__)
typedef uint64_t Vector32 __attribute__((vector_size(32)));
typedef uint64_t Vector64 __attribute__((vector_size(64)));

template <int kStreams, int kAhead, Cache kInto>
__attribute__((target("avx2"))) uint64_t read_32(const uint8_t* data, int64_t size) {
  return read<Vector32, kStreams, kAhead, kInto>(data, size);
}
template <int kStreams, int kAhead, Cache kInto>
__attribute__((target("avx512f"))) uint64_t read_64(const uint8_t* data, int64_t size) {
  return read<Vector64, kStreams, kAhead, kInto>(data, size);
}
#endif

struct ReadLoop {
  const char* name;
  uint64_t (*read)(const uint8_t* data, int64_t size);
  bool Processor::*needs;  // null: every processor has it
};

#define BITNET_LOOP(bits, bytes, streams, ahead, into, needs)                                         \
  {#bits "-bit loads, " #streams " streams, " #ahead " bytes ahead into " #into,                      \
   read_##bytes<streams, ahead, Cache::k##into>, needs}
#define BITNET_LOOPS_AHEAD(bits, bytes, streams, needs)                                               \
  BITNET_LOOP(bits, bytes, streams, 0, L1, needs), BITNET_LOOP(bits, bytes, streams, 512, L1, needs), \
      BITNET_LOOP(bits, bytes, streams, 1024, L1, needs), BITNET_LOOP(bits, bytes, streams, 2048, L1, needs), \
      BITNET_LOOP(bits, bytes, streams, 2048, L2, needs), BITNET_LOOP(bits, bytes, streams, 4096, L2, needs)
#define BITNET_LOOPS(bits, bytes, needs)                                                              \
  BITNET_LOOPS_AHEAD(bits, bytes, 1, needs), BITNET_LOOPS_AHEAD(bits, bytes, 2, needs),               \
      BITNET_LOOPS_AHEAD(bits, bytes, 4, needs), BITNET_LOOPS_AHEAD(bits, bytes, 8, needs)

constexpr ReadLoop kReadLoops[] = {
    BITNET_LOOPS(128, 16, nullptr),
#if defined(__x86_64__)
    BITNET_LOOPS(256, 32, &Processor::avx2),
    BITNET_LOOPS(512, 64, &Processor::avx512vnni),
#endif
};

const ReadLoop* find_loop(int64_t loop) {
  static const Processor processor = detect_processor();
  if (loop < 0 || loop >= static_cast<int64_t>(std::size(kReadLoops))) return nullptr;
  const ReadLoop& found = kReadLoops[loop];
  return found.needs == nullptr || processor.*found.needs ? &found : nullptr;
}

}  // namespace
}  // namespace bitnet

// The number of loops that read memory, and the name of one; null where the processor cannot run it.
extern "C" BITNET_EXPORT int64_t bitnet_kernels_read_loops() noexcept { return std::size(bitnet::kReadLoops); }
extern "C" BITNET_EXPORT const char* bitnet_kernels_read_loop_name(int64_t loop) noexcept {
  const bitnet::ReadLoop* found = bitnet::find_loop(loop);
  return found == nullptr ? nullptr : found->name;
}

// Reads size bytes, a multiple of 512, once with all threads by one of the loops, and returns their xor; 0 without
// reading where the processor cannot run it.
extern "C" BITNET_EXPORT uint64_t bitnet_kernels_read(const uint8_t* data, int64_t size, int64_t loop) noexcept {
  using namespace bitnet;
  const ReadLoop* found = find_loop(loop);
  if (found == nullptr) return 0;
  std::atomic<uint64_t> result{0};
  parallel_for((size + kReadBytes - 1) / kReadBytes, [&](int64_t i) {
    const int64_t begin = i * kReadBytes;
    result ^= found->read(data + begin, std::min(size - begin, kReadBytes));
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
