// The instruction sets of this processor and what the cases of a program found about each.

#ifndef BITNET_TESTS_TALLY_H_
#define BITNET_TESTS_TALLY_H_

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "kernels.h"

struct Tally {
  std::string isa;
  const bitnet::Kernels& kernels;
  int64_t cases = 0, wrong = 0;

  void add(int64_t wrong_outputs) {
    ++cases;
    wrong += wrong_outputs;
  }
};

// One for each instruction set, slowest first.
inline std::vector<Tally> tallies() {
  std::vector<Tally> result;
  std::istringstream names(bitnet_kernels_available_isas());
  for (std::string isa; std::getline(names, isa, ',');) result.push_back({isa, *bitnet::find_kernels(isa)});
  return result;
}

// Prints a line for each; the exit status of the program, which tells whether all outputs were right.
inline int report(const std::vector<Tally>& tallies) {
  int64_t wrong = 0;
  for (const Tally& t : tallies) {
    std::printf("%s: %d cases, %d wrong\n", t.isa.c_str(), static_cast<int>(t.cases), static_cast<int>(t.wrong));
    wrong += t.wrong;
  }
  return wrong != 0;
}

// Floats that differ in a bit. All NaNs are alike: which operand's NaN a result takes over is left to the compiler.
inline int64_t differing(const std::vector<float>& a, const std::vector<float>& b) {
  int64_t count = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    count += std::memcmp(&a[i], &b[i], sizeof(float)) != 0 && !(std::isnan(a[i]) && std::isnan(b[i]));
  }
  return count;
}

// run(kernels) of every instruction set but scalar, against what scalar gave; wrong: how much of that is wrong.
template <typename Run>
void compare(std::vector<Tally>& tallies, int64_t wrong, const std::vector<float>& scalar, const Run& run) {
  for (Tally& t : tallies) t.add(wrong + (t.isa == "scalar" ? 0 : differing(run(t.kernels), scalar)));
}

#endif  // BITNET_TESTS_TALLY_H_
