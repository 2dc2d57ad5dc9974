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

  // The rate of an element with the likelihood p: bits, also where the output is their sum, or the likelihood.
  template <class V>
  LIC_FAST_ANYWHERE V rate(V log_p, V p) const {
    const V least = V{} + (output == kLikelihood ? floor : log_bound);
    if (output == kLikelihood) return choose(less(p, least), least, p);
    const V held = bounded ? choose(less(log_p, least), least, log_p) : log_p;
    return held * static_cast<T>(-1.0 / kLn2);
  }
  template <class Math, class V>
  LIC_FAST_ANYWHERE V rate(V log_p) const {
    return rate(log_p, output == kLikelihood ? Math::exp(log_p) : V{});
  }

  // The derivative of rate() by log_p where a gradient passes; below a positive bound that at the bound times the
  // small likelihood.
  template <class V>
  LIC_FAST_ANYWHERE V slope(V p) const {
    const V none = V{}, least = none + floor;
    if (output == kLikelihood) return bounded ? p : choose(less(p, least), least, p);
    const V nats = none + static_cast<T>(-1.0 / kLn2), small = p * static_cast<T>(-1.0 / kLn2 / floor);
    return bounded ? choose(less(p, least), small, nats) : nats;
  }

  // The gradient of rate(), or 0 where it does not pass: `below` a positive bound CompressAI's one-sided rule.
  template <class C, class V>
  LIC_FAST_ANYWHERE V passing(V grad, C below) const {
    const V none = V{};
    const auto raises = output == kLikelihood ? less(grad, none) : less(none, grad);
    return choose(below, choose(raises, grad, none), grad);
  }

  // The gradient with respect to log_p from that of rate().
  template <class Math, class V>
  LIC_FAST_ANYWHERE V upstream(V grad, V log_p) const {
    if (bounded) grad = passing(grad, less(log_p, V{} + log_bound));
    return grad * slope(bounded || output == kLikelihood ? Math::exp(log_p) : log_p);
  }

  T log_bound, floor;
  bool bounded;
  int32_t output;
};

}  // namespace lic_fast
