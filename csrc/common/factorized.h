// The density of CompressAI's EntropyBottleneck with filters (3, 3, 3, 3), for one value (or a vector of them) at a
// time: everything between the value and the gradients stays in registers.
//
// The likelihood of v is sigmoid(high) - sigmoid(low), where low and high are the logits of the cumulative at v - 1/2
// and v + 1/2. Where the density is flat these are near numbers. So not (low, high) goes through the layers but
// (low, gap), gap = high - low > 0: matrices are not negative, so they keep gap's relative precision, and
//     tanh(low + gap) - tanh(low) = 2 A (E - 1) / ((A + 1) (A E + 1)),  A = exp(2 low), E = exp(2 gap),
// has no difference but expm1. The gradients go back by low (at a given gap) and by gap for the same reason.
//
// V: float or double, or a vector of T; Math brings exp, expm1 and log of V. T: float or double.
#pragma once

#include "common/rate_bound.h"
#include "common/tensors.h"

namespace lic_fast::factorized {

constexpr int32_t kWidth = 3;        // of the hidden layers
constexpr int32_t kLayers = 4;       // that end in a tanh; one more is only a matrix and a bias
constexpr int32_t kParameters = 58;  // of a channel: by layer the matrix row by row, the bias, the factor
constexpr int32_t kLastMatrix = 54;
constexpr int32_t kLastBias = 57;

LIC_FAST_ANYWHERE constexpr int32_t inputs(int32_t layer) { return layer == 0 ? 1 : kWidth; }
LIC_FAST_ANYWHERE constexpr int32_t matrix(int32_t layer) { return layer == 0 ? 0 : 9 + 15 * (layer - 1); }
LIC_FAST_ANYWHERE constexpr int32_t bias(int32_t layer) { return matrix(layer) + kWidth * inputs(layer); }
LIC_FAST_ANYWHERE constexpr int32_t factor(int32_t layer) { return bias(layer) + kWidth; }

enum Kind : int32_t { kBias, kMatrix, kFactor };
LIC_FAST_ANYWHERE constexpr Kind kind(int32_t place) {
  if (place >= kLastMatrix) return place == kLastBias ? kBias : kMatrix;
  for (int32_t layer = kLayers - 1; layer >= 0; --layer) {
    if (place >= factor(layer)) return kFactor;
    if (place >= bias(layer)) return kBias;
    if (place >= matrix(layer)) return kMatrix;
  }
  return kMatrix;
}

template <class T>
constexpr T kReach = T(10);  // tanh beyond is +-1 to the last digit
template <>
inline constexpr double kReach<double> = 20.0;

// softplus of a matrix entry, with torch's threshold
template <class Math, class T, class V>
LIC_FAST_ANYWHERE V softplus(V x) {
  const V none = V{}, size = choose(less(x, none), -x, x);
  return choose(less(none + T(20), x), x, choose(less(x, none), none, x) + Math::log1p(Math::exp(-size)));
}

template <class Math, class T, class V>
LIC_FAST_ANYWHERE V hyperbolic_tangent(V x) {
  const V none = V{}, reach = none + kReach<T>, size = choose(less(x, none), -x, x);
  const V grown = Math::expm1(T(2) * choose(less(reach, size), reach, size)), result = grown / (grown + T(2));
  return choose(less(x, none), -result, result);
}

// The derivative of what a parameter becomes, by kind: of softplus for a matrix, of tanh for a factor.
template <class Math, class T, class V>
LIC_FAST_ANYWHERE V softplus_slope(V x) {
  const V none = V{}, fall = Math::exp(choose(less(x, none), x, -x));
  return choose(less(x, none), fall, none + T(1)) / (T(1) + fall);
}
template <class Math, class T, class V>
LIC_FAST_ANYWHERE V tangent_slope(V x) {
  const V none = V{}, fall = Math::exp(T(2) * choose(less(x, none), x, -x)), whole = T(1) + fall;
  return T(4) * fall / (whole * whole);
}

// tanh(low), tanh(low + gap) and their difference
template <class V>
struct Bend {
  V low, high, rise;
};

template <class Math, class T, class V>
LIC_FAST_ANYWHERE Bend<V> bend(V low, V gap) {
  const V none = V{}, reach = none + kReach<T>, high = low + gap;
  const V a = at_most(at_least(low, -reach), reach), b = at_most(at_least(high, -reach), reach);
  const V step = choose(less(low, -reach) | less(reach, high), b - a, gap);
  const V grown = Math::exp_within(T(2) * a), more = grown * Math::expm1_within(T(2) * step);
  const V first = grown + T(1), second = first + more;  // A + 1, A E + 1
  const V share = T(2) / (first * second);
  return {T(1) - share * second, T(1) - share * first, share * more};
}

// What the way back needs of the way there: the inputs of each layer but the first, and the bends.
template <class V>
struct Trail {
  V low[kLayers + 1][kWidth], gap[kLayers + 1][kWidth];
  Bend<V> bends[kLayers][kWidth];
};

template <class V>
struct Logits {
  V low, gap;
};

template <class Math, class T, class V>
LIC_FAST_ANYWHERE Logits<V> walk(const T* w, V value, Trail<V>& trail) {
  trail.low[0][0] = value - T(0.5);
  LIC_FAST_UNROLL
  for (int32_t layer = 0; layer < kLayers; ++layer) {
    LIC_FAST_UNROLL
    for (int32_t i = 0; i < kWidth; ++i) {
      const T* row = w + matrix(layer) + i * inputs(layer);
      V low = row[0] * trail.low[layer][0], gap = layer == 0 ? V{} + row[0] : row[0] * trail.gap[layer][0];
      for (int32_t j = 1; j < inputs(layer); ++j) {
        low = low + row[j] * trail.low[layer][j];
        gap = gap + row[j] * trail.gap[layer][j];
      }
      low = low + w[bias(layer) + i];
      const T strength = w[factor(layer) + i];
      const Bend<V> bent = bend<Math, T>(low, gap);
      trail.bends[layer][i] = bent;
      trail.low[layer + 1][i] = low + strength * bent.low;
      trail.gap[layer + 1][i] = gap + strength * bent.rise;
    }
  }
  const V(&low)[kWidth] = trail.low[kLayers], (&gap)[kWidth] = trail.gap[kLayers];
  const T* row = w + kLastMatrix;
  return {(row[0] * low[0] + row[1] * low[1]) + row[2] * low[2] + w[kLastBias],
          (row[0] * gap[0] + row[1] * gap[1]) + row[2] * gap[2]};
}

// log(sigmoid(low + gap) - sigmoid(low)) and its derivatives by low (at a given gap) and by gap
template <class V>
struct LogLikelihood {
  V value, by_low, by_gap;
};

template <class Math, class T, class V>
LIC_FAST_ANYWHERE LogLikelihood<V> log_likelihood(Logits<V> at) {
  const V none = V{}, one = none + T(1), low = at.low, high = low + at.gap;
  const V far_low = choose(less(low, none), -low, low), far_high = choose(less(high, none), -high, high);
  // what is beyond 80 is below the last digit of what it is added to
  const V least = none - T(80), e_low = Math::exp_within(at_least(-far_low, least));
  const V e_high = Math::exp_within(at_least(-far_high, least));
  const V fall = -Math::expm1_within(at_least(-at.gap, least)), q_low = one + e_low, q_high = one + e_high;
  const V ratio = fall / (q_low * q_high), kept = choose(less(one, ratio), one, ratio);
  const V above = T(0.5) * (low + far_low), below = T(0.5) * (high - far_high);
  const V s_low = choose(less(low, none), e_low, one) / q_low, s_high = choose(less(high, none), one, e_high) / q_high;
  return {Math::log(kept) - above + below, s_high - s_low, s_high + (one - fall) / fall};
}

// The gradient of the value, given those of the logits. The gradients of the parameters, before their transforms, are
// added to sums [kParameters].
template <class T, class V>
LIC_FAST_ANYWHERE V walk_back(const T* w, const Trail<V>& trail, V by_low, V by_gap, V* sums) {
  V low[kWidth], gap[kWidth];
  LIC_FAST_UNROLL
  for (int32_t j = 0; j < kWidth; ++j) {
    sums[kLastMatrix + j] = sums[kLastMatrix + j] + (by_low * trail.low[kLayers][j] + by_gap * trail.gap[kLayers][j]);
    low[j] = w[kLastMatrix + j] * by_low;
    gap[j] = w[kLastMatrix + j] * by_gap;
  }
  sums[kLastBias] = sums[kLastBias] + by_low;
  LIC_FAST_UNROLL
  for (int32_t layer = kLayers - 1; layer >= 0; --layer) {
    V next_low[kWidth] = {}, next_gap[kWidth] = {};
    LIC_FAST_UNROLL
    for (int32_t i = 0; i < kWidth; ++i) {
      const Bend<V>& bent = trail.bends[layer][i];
      const T strength = w[factor(layer) + i];
      const int32_t f = factor(layer) + i, b = bias(layer) + i, row = matrix(layer) + i * inputs(layer);
      sums[f] = sums[f] + (low[i] * bent.low + gap[i] * bent.rise);
      const V across = strength * gap[i];
      const V g_low =
          low[i] + strength * low[i] * (T(1) - bent.low * bent.low) - across * bent.rise * (bent.low + bent.high);
      const V g_gap = gap[i] + across * (T(1) - bent.high * bent.high);
      sums[b] = sums[b] + g_low;
      for (int32_t j = 0; j < inputs(layer); ++j) {
        const V by_gap_here = layer == 0 ? g_gap : g_gap * trail.gap[layer][j];
        sums[row + j] = sums[row + j] + (g_low * trail.low[layer][j] + by_gap_here);
        next_low[j] = next_low[j] + w[row + j] * g_low;
        next_gap[j] = next_gap[j] + w[row + j] * g_gap;
      }
    }
    LIC_FAST_UNROLL
    for (int32_t j = 0; j < kWidth; ++j) {
      low[j] = next_low[j];
      gap[j] = next_gap[j];
    }
  }
  return low[0];
}

// The two ops, in each native library
inline void define(torch::stable::detail::StableLibrary& m) {
  m.def(
      "factorized_rate_out(Tensor y, Tensor weights, Tensor? medians, Tensor? seed, int quantize, "
      "float likelihood_bound, int output, Tensor(a!) y_hat, Tensor(b!) rate) -> ()");
  m.def(
      "factorized_rate_bwd_out(Tensor? grad_y_hat, Tensor? grad_rate, Tensor y, Tensor weights, Tensor? medians, "
      "Tensor? seed, int quantize, float likelihood_bound, int output, Tensor(a!) grad_y, Tensor(b!) grad_weights, "
      "Tensor(c!) grad_medians) -> ()");
}

}  // namespace lic_fast::factorized
