// Any processor: std::fma, an instruction where there is one and exact in software where there is none.

#include <cmath>

#define HEAD_TARGET
#include "head_rows.h"

namespace bitnet {
namespace {

struct ScalarLanes {
  static constexpr int kStreams = 1;
  static constexpr int kRows = 1;
  static constexpr int kXRows = 1;
  float v[kHeadLanes];

  static ScalarLanes zero() { return {}; }
  static ScalarLanes load(const float* x) {
    ScalarLanes lanes;
    std::memcpy(lanes.v, x, sizeof(lanes.v));
    return lanes;
  }
  static ScalarLanes widen(const uint16_t* w) {
    ScalarLanes lanes;
    for (int j = 0; j < kHeadLanes; ++j) {
      const uint32_t bits = uint32_t{w[j]} << 16;
      std::memcpy(&lanes.v[j], &bits, sizeof(bits));
    }
    return lanes;
  }
  static ScalarLanes fma(const ScalarLanes& a, const ScalarLanes& b, const ScalarLanes& c) {
    ScalarLanes lanes;
    for (int j = 0; j < kHeadLanes; ++j) lanes.v[j] = std::fma(a.v[j], b.v[j], c.v[j]);
    return lanes;
  }
  float sum() const {
    float s[kHeadLanes];
    std::memcpy(s, v, sizeof(s));
    for (int half = kHeadLanes / 2; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) s[j] += s[j + half];
    }
    return s[0];
  }
};

}  // namespace

HeadRows head_rows_scalar() { return head_rows<ScalarLanes>; }

}  // namespace bitnet
