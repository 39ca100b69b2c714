// The loops of attention_gradient.h for any Lanes (float_lanes.h).

#ifndef BITNET_KERNELS_ATTENTION_GRADIENT_LOOPS_H_
#define BITNET_KERNELS_ATTENTION_GRADIENT_LOOPS_H_

#include <limits>

#include "attention_gradient.h"
#include "attention_loops.h"
#include "float_lanes.h"

namespace bitnet {
namespace {

template <typename Lanes>
struct AttentionGradientLoops {
  using Vec = typename Lanes::Vec;

  BITNET_TARGET static void softmax(float* x, int64_t width, int64_t begin, int64_t end, const uint8_t* visible,
                                    float scale) {
    constexpr float kHidden = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < begin; ++i) x[i] = kHidden;
    for (int64_t i = end; i < width; ++i) x[i] = kHidden;
    if (visible != nullptr) {
      for (int64_t i = begin; i < end; ++i) x[i] = visible[i] ? x[i] : kHidden;
    }
    const Vec factor = Lanes::set1(scale);
    Vec most = Lanes::set1(kHidden);
    for (int64_t i = 0; i < width; i += kLanes) {
      const Vec scaled = Lanes::mul(Lanes::load(x + i), factor);
      Lanes::store(x + i, scaled);
      most = Lanes::max(scaled, most);
    }
    const float largest = Lanes::max_of(most);
    Vec sum = Lanes::set1(0.0f);
    for (int64_t i = 0; i < width; i += kLanes) {
      const Vec power = AttentionLoops<Lanes>::exp(Lanes::sub(Lanes::load(x + i), Lanes::set1(largest)));
      Lanes::store(x + i, power);
      sum = Lanes::add(sum, power);
    }
    const Vec inverse = Lanes::set1(1.0f / Lanes::sum_of(sum));
    for (int64_t i = 0; i < width; i += kLanes) Lanes::store(x + i, Lanes::mul(Lanes::load(x + i), inverse));
  }

  BITNET_TARGET static void gradient(const float* p, float* dp, int64_t width, float scale) {
    Vec sum = Lanes::set1(0.0f);
    for (int64_t i = 0; i < width; i += kLanes) sum = Lanes::fma(Lanes::load(p + i), Lanes::load(dp + i), sum);
    const Vec mean = Lanes::set1(Lanes::sum_of(sum)), factor = Lanes::set1(scale);
    for (int64_t i = 0; i < width; i += kLanes) {
      const Vec centred = Lanes::sub(Lanes::load(dp + i), mean);
      Lanes::store(dp + i, Lanes::mul(Lanes::mul(Lanes::load(p + i), factor), centred));
    }
  }

  static constexpr AttentionGradientKernels kernels() { return {softmax, gradient}; }
};

}  // namespace
}  // namespace bitnet

#endif  // BITNET_KERNELS_ATTENTION_GRADIENT_LOOPS_H_
