// The speed limit of memory: a loop that only reads, for the benchmark to divide by.

#include <cstdint>
#include <cstring>

// Reads size bytes as four streams (one alone loses a fifth of the bandwidth) and returns their xor, so that the
// compiler keeps the loads. size is a multiple of 256.
extern "C" uint64_t bitnet_kernels_read(const uint8_t* data, int64_t size) {
  constexpr int kStreams = 4, kWords = 8;
  const int64_t stream = size / kStreams;
  uint64_t words[kStreams][kWords] = {};
  for (int64_t i = 0; i < stream; i += 64) {
    for (int s = 0; s < kStreams; ++s) {
      uint64_t line[kWords];
      std::memcpy(line, data + s * stream + i, sizeof(line));
      for (int j = 0; j < kWords; ++j) words[s][j] ^= line[j];
    }
  }
  uint64_t result = 0;
  for (int s = 0; s < kStreams; ++s) {
    for (int j = 0; j < kWords; ++j) result ^= words[s][j];
  }
  return result;
}
