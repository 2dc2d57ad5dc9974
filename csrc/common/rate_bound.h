// What the likelihood kernels share beside their densities: how y is quantised, how a log-likelihood becomes the rate,
// and how the gradient comes back to it; lic_fast/reference/_noise.py and _bound.py say what is computed.
//
// Templates over a value V: float or double, or on the CPU a vector of them (GCC's vector extensions). V has
// arithmetic and comparisons, element by element. `Math` brings the functions: Math::exp(V).
#pragma once

#include <cmath>
#include <limits>

#include "common/philox.h"

namespace lic_fast {

enum Quantize : int32_t { kNotQuantized = 0, kNoise = 1, kStraightThrough = 2, kDequantize = 3 };
enum RateOutput : int32_t { kBits = 0, kLikelihood = 1, kBitsPerChannel = 2 };

constexpr double kLn2 = 0.69314718055994530942;

template <class T>
constexpr T kFirstInteger = static_cast<T>(8388608.0);  // 2^23: no number from here on has a fraction
template <>
inline constexpr double kFirstInteger<double> = 4503599627370496.0;

// To the nearest integer, halves to even, like torch.round; zeros keep their sign. T: the type of V's elements.
template <class T, class V>
LIC_FAST_ANYWHERE V round_even(V x) {
  const V none = V{}, big = none + kFirstInteger<T>;
  const auto negative = less(x, none);
  const V size = choose(negative, -x, x), whole = (size + big) - big, rounded = choose(negative, -whole, whole);
  const V kept = choose(less(none, size), rounded, x);  // zeros as they are
  return choose(less(size, big), kept, x);
}

// y as the likelihood sees it. centre: 0 where there is none (then `centred` is false); u: noise, read for kNoise only.
template <class T, class V>
LIC_FAST_ANYWHERE V quantized(V y, V centre, V u, int32_t mode, bool centred) {
  if (mode == kNotQuantized) return y;
  if (mode == kNoise) return y + u;
  return centred ? round_even<T>(y - centre) + centre : round_even<T>(y);
}

template <class T>
struct RateRule {  // made on the host
  RateRule(double likelihood_bound, int32_t output_)
      : log_bound(static_cast<T>(likelihood_bound > 0 ? ::log(likelihood_bound) : 0.0)),
        floor(likelihood_bound > 0 ? static_cast<T>(likelihood_bound) : std::numeric_limits<T>::min()),
        bounded(likelihood_bound > 0),
        output(output_) {}

  // The rate of an element: bits, also where the output is their sum, or the likelihood.
  template <class Math, class V>
  LIC_FAST_ANYWHERE V rate(V log_p) const {
    if (output == kLikelihood) {
      const V p = Math::exp(log_p), least = V{} + floor;
      return choose(less(p, least), least, p);
    }
    const V least = V{} + log_bound;
    const V held = bounded ? choose(less(log_p, least), least, log_p) : log_p;
    return held * static_cast<T>(-1.0 / kLn2);
  }

  // The gradient with respect to log_p from that of rate(); below a positive bound CompressAI's one-sided rule.
  template <class Math, class V>
  LIC_FAST_ANYWHERE V upstream(V grad, V log_p) const {
    const V none = V{}, edge = none + log_bound;
    if (output == kLikelihood) {
      const V p = Math::exp(log_p), least = none + floor;
      if (!bounded) return grad * choose(less(p, least), least, p);
      return choose(less(log_p, edge), choose(less(grad, none), grad * p, none), grad * p);
    }
    const V nats = grad * static_cast<T>(-1.0 / kLn2);
    if (!bounded) return nats;
    const V raised = choose(less(none, grad), nats * Math::exp(log_p - edge), none);
    return choose(less(log_p, edge), raised, nats);
  }

  T log_bound, floor;
  bool bounded;
  int32_t output;
};

}  // namespace lic_fast
