// Densities convolved with a unit box, and their mixtures: what lic_fast/reference/mixture_rate.py specifies, in the
// precision of the arithmetic and without branches.
//
// Templates over a policy M: M::Value is a float or a double, or on the CPU a vector of them, with the language's
// arithmetic; M::Scalar is the type of its elements; M brings less, select, exp, expm1_negative and others.
// A density is given as exp(exponent) * factor with a factor that neither under- nor overflows, so that a mixture needs
// one logarithm; its derivatives are those of exp(exponent) * factor over exp(exponent). With a = (|d| - 1/2) / s and b
// = (|d| + 1/2) / s every form is free of differences of near numbers.
#pragma once

#include "common/polynomial.h"
#include "common/rate_bound.h"

namespace lic_fast {

enum Family : int32_t { kGaussian = 0, kLogistic = 1, kLaplace = 2 };
constexpr int64_t kMostComponents = 16;
constexpr int64_t kFewComponents = 4;
#ifdef __CUDACC__  // loops over kMost components without a loop, where they are few: their arrays are registers then
#define LIC_FAST_UNROLL_FEW _Pragma("unroll (kMost <= kFewComponents ? kMost : 1)")
#else
#define LIC_FAST_UNROLL_FEW
#endif

template <class M>
struct Density {
  typename M::Value exponent, factor;  // the likelihood is exp(exponent) * factor
  typename M::Value decay;             // exp(exponent); fp32: 0 below e^-87
  typename M::Value by_d, by_s;        // derivatives of the likelihood over exp(exponent); by_d is that by |d|
};

// exp(x^2 / 2) times the normal probability beyond x >= 0. fp32: it is u = 1 / (x / sqrt(2) + 2.5) times a polynomial
// of u in (0, 0.4], to 1.3e-7 (of the result, also for large x), 4.7e-7 with rounding, 1.2e-7 on average.
template <class M>
LIC_FAST_ANYWHERE typename M::Value scaled_tail(typename M::Value x) {
  using V = typename M::Value;
  if constexpr (sizeof(typename M::Scalar) == 8) {
    return M::erfcx(x * 0.70710678118654752440) * 0.5;
  } else {
    const V u = M::reciprocal(M::fused(x, M::all(0.707106781f), M::all(2.5f)));
    return u * polynomial<M>(u, 0.282094827f, 0.705217517f, 1.62376961f, 3.29187128f, 6.90541541f, -0.681931548f,
                             51.5920498f, -139.527592f, 95.8568375f);
  }
}

// The mean of exp(-z t - h^2 t^2 / 2) over t in [-1, 1], for z <= 1/2 and h <= 1/4, to 1e-7: what the box makes of a
// normal density with h = 1 / (2 s) and z = |d| / (2 s^2). Double Taylor series in z^2 and h^2.
template <class M>
LIC_FAST_ANYWHERE typename M::Value box_mean(typename M::Value z2, typename M::Value h2) {
  using T = typename M::Scalar;
  const typename M::Value c0 = polynomial<M>(z2, T(1), T(1.0 / 6), T(1.0 / 120), T(1.0 / 5040));
  const typename M::Value c1 = polynomial<M>(z2, T(-1.0 / 6), T(-1.0 / 20), T(-1.0 / 336));
  const typename M::Value c2 = polynomial<M>(z2, T(1.0 / 40), T(1.0 / 112), T(1.0 / 1728));
  return M::fused(M::fused(M::fused(h2, M::all(T(-1.0 / 336)), c2), h2, c1), h2, c0);
}

// Three forms. Outside the box (a >= 0) and inside it by scaled_tail. Where the density is flat over the box both would
// subtract near numbers: there, in fp32, it is the density at d times box_mean. It is rare that a scale is so large,
// and the branch saves a tenth of the work. The derivatives are those of the reference: the hazard (the density at a
// over the likelihood) is numerator / factor / sqrt(2 pi) in each form. The factor is a normal number; NaN is in the
// exponent.
template <class M, bool kGradients>
LIC_FAST_ANYWHERE Density<M> gaussian(typename M::Value distance, typename M::Value s) {
  using V = typename M::Value;
  using T = typename M::Scalar;
  constexpr T kDensity = T(0.39894228040143267794);  // 1 / sqrt(2 pi)
  constexpr bool kSingle = sizeof(T) == 4;           // fp64 has digits enough for the differences
  const V inverse = M::reciprocal(s);
  const V a = (distance - T(0.5)) * inverse, b = (distance + T(0.5)) * inverse, m = distance * inverse;
  const V drop = -m * inverse;  // (a^2 - b^2) / 2: log of the density at b over that at a
  const V fall = M::expm1_negative(drop), left = fall + T(1);
  const V near = a * a * T(-0.5), tail = scaled_tail<M>(M::abs(a)), rest = left * scaled_tail<M>(b);
  const auto inside = M::less(a, T(0));
  const V one = M::all(T(1)), density = M::exp_negative(near);
  V peak = M::select(inside, density, one);
  Density<M> result;
  result.exponent = M::select(inside, V{}, near);
  result.decay = M::select(inside, one, density);
  result.factor = M::select(inside, M::fused(-density, tail + rest, one), tail - rest);
  if (kSingle) {
    const auto wide = M::no_less(s, T(8));
    if (M::any(wide)) {
      const auto flat = M::both(wide, M::no_less(drop, T(-1)));
      const V h2 = inverse * inverse * T(0.25), z = drop * T(-0.5), centre = m * m * T(-0.5);
      const V mean = box_mean<M>(z * z, h2) * inverse * kDensity;
      peak = M::select(flat, M::exp(z - h2 * T(0.5)), peak);
      result.factor = M::select(flat, mean, result.factor);
      result.exponent = M::select(flat, centre, result.exponent);
      result.decay = M::select(flat, M::exp_negative(centre), result.decay);
      result.exponent = M::select(M::equal(inverse, T(0)), M::all(static_cast<T>(-HUGE_VAL)), result.exponent);
    }
  }
  if constexpr (kGradients) {
    const V height = peak * (inverse * kDensity);  // the density at a over exp(exponent), times its scale
    result.by_d = height * fall;
    result.by_s = -height * M::fused(a, fall, left * inverse);
  }
  return result;
}

// sigmoid(-a) sigmoid(b) (1 - exp(-1 / s)).
template <class M, bool kGradients>
LIC_FAST_ANYWHERE Density<M> logistic(typename M::Value distance, typename M::Value s) {
  using V = typename M::Value;
  using T = typename M::Scalar;
  const V inverse = M::reciprocal(s);
  const V a = (distance - T(0.5)) * inverse, b = (distance + T(0.5)) * inverse;
  const auto inside = M::less(a, T(0));
  const V width = M::expm1_negative(-inverse);                    // exp(-1 / s) - 1
  const V slope = M::expm1_negative(distance * inverse * T(-2));  // exp(-a - b) - 1
  const V at_a = M::exp_negative(-M::abs(a));
  const V at_b = at_a * (M::select(inside, slope, width) + T(1));  // exp(-b)
  const V share = M::reciprocal((at_a + T(1)) * (at_b + T(1)));
  Density<M> result;
  result.exponent = M::select(inside, V{}, -a);
  result.decay = M::select(inside, M::all(T(1)), at_a);
  result.factor = -width * share;
  if constexpr (kGradients) {
    const V rise = M::select(inside, at_a, M::all(T(1)));  // sigmoid(a) = rise / (1 + at_a)
    const V scaled = result.factor * inverse;
    result.by_d = slope * rise * share * scaled;
    const V edges = (a * rise * (at_b + T(1)) - b * at_b * (at_a + T(1))) * share;
    result.by_s = edges * scaled - (width + T(1)) * share * inverse * inverse;
  }
  return result;
}

template <class M, bool kGradients>
LIC_FAST_ANYWHERE Density<M> laplace(typename M::Value distance, typename M::Value s) {
  using V = typename M::Value;
  using T = typename M::Scalar;
  const V inverse = M::reciprocal(s);
  const V a = (distance - T(0.5)) * inverse, b = (distance + T(0.5)) * inverse;
  const auto inside = M::less(a, T(0));
  const V width = M::expm1_negative(-inverse);                    // exp(-1 / s) - 1
  const V near = M::expm1_negative(-M::abs(a));                   // exp(-|a|) - 1
  const V slope = M::expm1_negative(distance * inverse * T(-2));  // exp(|a| - b) - 1 inside
  const V at_a = near + T(1), at_b = at_a * (slope + T(1));       // exp(-|a|), and exp(-b) inside
  Density<M> result;
  result.exponent = M::select(inside, V{}, -a);
  result.decay = M::exp_negative(result.exponent);  // at_a has no digits far out
  result.factor = M::select(inside, near + (near + slope + near * slope), width) * T(-0.5);
  if constexpr (kGradients) {
    const V change = slope * at_a, moment = a * at_a - b * at_b, half = inverse * T(0.5);
    result.by_d = M::select(inside, change, width) * half;
    result.by_s = M::select(inside, moment, -(a * width + (width + T(1)) * inverse)) * half;
  }
  return result;
}

template <class M, bool kGradients>
LIC_FAST_ANYWHERE Density<M> density(int32_t family, typename M::Value distance, typename M::Value s) {
  if (family == kGaussian) return gaussian<M, kGradients>(distance, s);
  if (family == kLogistic) return logistic<M, kGradients>(distance, s);
  return laplace<M, kGradients>(distance, s);
}

// The logarithm of a likelihood. That of a Gaussian needs no care for zeros and infinities.
template <class M>
LIC_FAST_ANYWHERE typename M::Value log_of(int32_t family, const Density<M>& density) {
  return density.exponent + (family == kGaussian ? M::log_normal(density.factor) : M::log(density.factor));
}

// The scale that the density has: no smaller than the bound; NaN where it is not positive. A positive scale is held
// above 1e-30, so that its reciprocal and the products with it are finite.
template <class M>
LIC_FAST_ANYWHERE typename M::Value bounded_scale(typename M::Value scale, typename M::Scalar bound) {
  using T = typename M::Scalar;
  const typename M::Value s = M::at_least(scale, bound > T(1e-30) ? bound : T(1e-30));
  if (bound > T(0)) return s;
  return M::select(M::less(typename M::Value{}, scale), s, M::all(static_cast<T>(NAN)));
}

// The gradient of a scale: none below the bound, unless it would raise the scale.
template <class M>
LIC_FAST_ANYWHERE typename M::Value through_bound(typename M::Value grad, typename M::Value scale,
                                                  typename M::Scalar bound) {
  using T = typename M::Scalar;
  return M::select(M::both(M::less(scale, bound), M::no(M::less(grad, T(0)))), typename M::Value{}, grad);
}

// One element (or vector of them) of a mixture. What its components add is over exp(top).
template <class M, int64_t kMost>
struct Mixed {
  typename M::Value log_p, p;    // of the mixture
  typename M::Value sum;         // of what the components add
  typename M::Value weight_sum;  // logits only: of exp(logit), the weights here
  typename M::Value weight[kMost];
  typename M::Value decay[kMost];       // of a component; with its weight where that is a logit's
  typename M::Value likelihood[kMost];  // decay * factor
};

// The components one by one, over exp(top): so that the sum cannot overflow, and underflows only where nothing is left,
// top is the largest exponent of one that weighs anything. One without weight counts as at most e^80 times as likely.
template <class M, int64_t kMost, class Component>
LIC_FAST_ANYWHERE typename M::Value mix_far(int64_t components, bool logits, const Component& component,
                                            Mixed<M, kMost>& mixed) {
  using V = typename M::Value;
  using T = typename M::Scalar;
  V top = M::all(T(-3.4e38));  // below what is worth a thought, and finite
  LIC_FAST_UNROLL_FEW
  for (int64_t k = 0; k < kMost; ++k) {
    if (k >= components) break;
    const V exponent = component(k).exponent;
    top = M::select(M::less(V{}, mixed.weight[k]), M::greater(exponent, top), top);
  }
  mixed.sum = V{};
  LIC_FAST_UNROLL_FEW
  for (int64_t k = 0; k < kMost; ++k) {
    if (k >= components) break;
    const Density<M> part = component(k);
    mixed.decay[k] = M::exp_negative(M::at_most(part.exponent - top, T(80)));
    if (logits) mixed.decay[k] = mixed.decay[k] * mixed.weight[k];
    mixed.likelihood[k] = mixed.decay[k] * part.factor;
    mixed.sum = mixed.sum + (logits ? mixed.likelihood[k] : mixed.weight[k] * mixed.likelihood[k]);
  }
  return top;
}

// Weights are probabilities (a negative one gives NaN) or logits: `weight(k)`; `component(k)` is the k-th density.
template <class M, int64_t kMost, class Weight, class Component>
LIC_FAST_ANYWHERE void mix(int64_t components, bool logits, const Weight& weight, const Component& component,
                           Mixed<M, kMost>& mixed) {
  using V = typename M::Value;
  using T = typename M::Scalar;
  V most = M::all(T(-3.4e38));
  LIC_FAST_UNROLL_FEW
  for (int64_t k = 0; k < kMost; ++k) {
    if (k >= components) break;
    const V w = weight(k);
    most = logits ? M::greater(w, most) : most;
    mixed.weight[k] = logits ? w : M::select(M::no_less(w, T(0)), w, M::all(static_cast<T>(NAN)));
  }
  mixed.sum = mixed.weight_sum = V{};
  LIC_FAST_UNROLL_FEW
  for (int64_t k = 0; k < kMost; ++k) {
    if (k >= components) break;
    const Density<M> part = component(k);
    mixed.decay[k] = part.decay;
    if (logits) {
      mixed.weight[k] = M::exp_negative(mixed.weight[k] - most);
      mixed.weight_sum = mixed.weight_sum + mixed.weight[k];
      mixed.decay[k] = mixed.decay[k] * mixed.weight[k];
    }
    mixed.likelihood[k] = mixed.decay[k] * part.factor;
    mixed.sum = mixed.sum + (logits ? mixed.likelihood[k] : mixed.weight[k] * mixed.likelihood[k]);
  }
  V top = V{}, scale = M::all(T(1));
  const auto far =
      M::less(mixed.sum, T(1e-25));  // so small that decay may have lost digits: made again, for these only
  if (M::any(far)) {
    Mixed<M, kMost> again = mixed;
    top = M::select(far, mix_far<M>(components, logits, component, again), top);
    scale = M::exp_negative(top);
    mixed.sum = M::select(far, again.sum, mixed.sum);
    LIC_FAST_UNROLL_FEW
    for (int64_t k = 0; k < kMost; ++k) {
      if (k >= components) break;
      mixed.decay[k] = M::select(far, again.decay[k], mixed.decay[k]);
      mixed.likelihood[k] = M::select(far, again.likelihood[k], mixed.likelihood[k]);
    }
  }
  const V sum = logits ? mixed.sum / mixed.weight_sum : mixed.sum;
  mixed.log_p = top + M::log(sum);
  mixed.p = sum * scale;
}

// The k-th component's share in the derivatives times g, the gradient of log p: what to multiply Density's with; and
// the gradient of its weight. scaled: g / mixed.sum.
template <class M, int64_t kMost>
LIC_FAST_ANYWHERE void share(const Mixed<M, kMost>& mixed, int64_t k, bool logits, typename M::Value g,
                             typename M::Value scaled, typename M::Value& of_g, typename M::Value& grad_weight) {
  const typename M::Value ratio = mixed.likelihood[k] * scaled;
  of_g = (logits ? mixed.decay[k] : mixed.weight[k] * mixed.decay[k]) * scaled;
  grad_weight = logits ? ratio - mixed.weight[k] / mixed.weight_sum * g : ratio;
}

}  // namespace lic_fast
