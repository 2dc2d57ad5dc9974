// The loops of mixture_rate.cpp over one stretch of one sample, for every dtype, family and instruction set.
//
// A stretch is walked in blocks: their noise is made at once, then vector after vector is loaded, widened, computed and
// stored. A mixture keeps what its components have come to in a few vectors a component on the stack.
// The slopes are stacked planes of y's shape: the derivatives of an element's rate by y_hat - mean of each component,
// by each scale, and in a mixture by each weight. Their last bits are notes of the bounds: those by a scale say whether
// it lay below its own, those by the first component's distance whether the likelihood did.
#pragma once

#include "common/likelihood.h"
#include "common/tensors.h"
#include "cpu/noise.h"

namespace lic_fast {
namespace {

constexpr int64_t kBlock = 256;  // elements; a multiple of every vector

struct Input {
  const void* data;
  int64_t stride;  // elements from one sample to the next
};

struct MixtureJob {
  Input y, scales, means, weights;  // data null where there are none
  int64_t batch, sample, inner, components, seed;
  int32_t families[kMostComponents];
  int32_t type, quantize, output;
  bool logits;
  double scale_bound, likelihood_bound;
  void* y_hat;  // null where not asked for, as all that follow
  void* rate;
  void* slopes;
  double* sums;  // of bits: one a row, or a piece of a row
  bool streams;  // the slopes go past the caches

  int64_t plane() const { return batch * sample; }
};

struct Stretch {
  int64_t b, begin, end;  // elements [begin, end) of sample b
  int64_t first_sum;      // the place of its first row, or of its piece of a row, in the sums
};

// The pointers of one sample, typed.
template <class T>
struct Sample {
  Sample(const MixtureJob& job, int64_t b)
      : y(at(job.y, b)), scales(at(job.scales, b)), means(at(job.means, b)), weights(at(job.weights, b)) {}
  static const T* at(const Input& input, int64_t b) {
    return input.data ? static_cast<const T*>(input.data) + b * input.stride : nullptr;
  }
  const T *y, *scales, *means, *weights;
};

// What is the same for all elements of a stretch.
template <class M>
struct Settings {
  explicit Settings(const MixtureJob& job)
      : rule(job.likelihood_bound, job.output), scale_bound(static_cast<typename M::Scalar>(job.scale_bound)) {}
  RateRule<typename M::Scalar> rule;
  typename M::Scalar scale_bound;
};

// What the components of a mixture come to over one block. They are computed one after the other: so memory is read in
// few streams at a time, and each family's loop has no branch in it.
template <class M>
struct Parts {
  using S = typename M::Scalar;
  struct Part {
    alignas(64) S exponent[kBlock], factor[kBlock], decay[kBlock], by_d[kBlock], by_s[kBlock];
  };
  Part at[kMostComponents];
};

template <class M, class T, bool kGradients, int32_t kFamily>
LIC_FAST_INLINE void component_block(const Settings<M>& set, const T* means, const T* scales,
                                     const typename M::Scalar* y_hat, int64_t n, typename Parts<M>::Part& to) {
  using V = typename M::Value;
  for (int64_t j = 0; j < n; j += M::kLanes) {
    __builtin_prefetch(means + j + kBlock);
    __builtin_prefetch(scales + j + kBlock);
    const V d = M::load(y_hat + j) - load_part<M>(means + j, n - j);
    const V scale = load_part<M>(scales + j, n - j);
    const Density<M> part = density<M, kGradients>(kFamily, M::abs(d), bounded_scale<M>(scale, set.scale_bound));
    M::store(to.exponent + j, part.exponent);
    M::store(to.factor + j, part.factor);
    M::store(to.decay + j, part.decay);
    if constexpr (kGradients) {
      M::store(to.by_d + j, M::flipped(part.by_d, d));
      M::store(to.by_s + j, M::noted(part.by_s, M::less(scale, set.scale_bound)));
    }
  }
}

template <class M, class T, bool kGradients>
LIC_FAST_INLINE void components_of_block(const MixtureJob& job, const Settings<M>& set, const Sample<T>& from,
                                         int64_t i, int64_t n, const typename M::Scalar* y_hat, Parts<M>& parts) {
  for (int64_t k = 0; k < job.components; ++k) {
    const T *means = from.means + k * job.sample + i, *scales = from.scales + k * job.sample + i;
    switch (job.families[k]) {
      case kGaussian: component_block<M, T, kGradients, kGaussian>(set, means, scales, y_hat, n, parts.at[k]); break;
      case kLogistic: component_block<M, T, kGradients, kLogistic>(set, means, scales, y_hat, n, parts.at[k]); break;
      default: component_block<M, T, kGradients, kLaplace>(set, means, scales, y_hat, n, parts.at[k]);
    }
  }
}

template <class M>
LIC_FAST_INLINE double sum_of(const typename M::Scalar* values, int64_t n) {  // in one order for any vector width
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int64_t l = 0; l < 8; ++l) lanes[l] += values[i + l];
  }
  for (; i < n; ++i) lanes[i & 7] += values[i];
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// Adds the bits of elements [i, i + n) of the sample to the sums of their rows.
template <class M>
LIC_FAST_INLINE void add_to_rows(const MixtureJob& job, const Stretch& at, int64_t i, int64_t n,
                                 const typename M::Scalar* bits) {
  const int64_t first_row = at.begin / job.inner;
  for (int64_t j = 0; j < n;) {
    const int64_t row = (i + j) / job.inner;
    const int64_t length = std::min(n - j, (row + 1) * job.inner - (i + j));
    job.sums[at.first_sum + row - first_row] += sum_of<M>(bits + j, length);
    j += length;
  }
}

template <class M>
constexpr int64_t kNoiseRoom = kBlock + M::kLanes + StretchNoise<M>::kSlack;

// The noise of elements [i, i + n) of the sample: where in `room` it begins.
template <class M>
LIC_FAST_INLINE const typename M::Scalar* noise_of(const MixtureJob& job, const Stretch& at, int64_t i, int64_t n,
                                                   typename M::Scalar (&room)[kNoiseRoom<M>]) {
  if (job.quantize != kNoise) return room;
  return room + StretchNoise<M>::fill(job.seed, at.b * job.sample + i, n, room);
}

// The quantised values of a mixture's block, which rounds about zero.
template <class M, class T>
LIC_FAST_INLINE void quantize_block(const MixtureJob& job, const Sample<T>& from, const typename M::Scalar* noise,
                                    int64_t i, int64_t n, typename M::Scalar* y_hat) {
  using V = typename M::Value;
  for (int64_t j = 0; j < n; j += M::kLanes) {
    const V y = load_part<M>(from.y + i + j, n - j);
    M::store(y_hat + j, quantized<typename M::Scalar>(y, V{}, M::load(noise + j), job.quantize, false));
  }
}

// Where the results of a stretch go; null where not asked for.
template <class T, class S>
struct Rooms {
  Rooms(const MixtureJob& job, int64_t b)
      : y_hat(job.y_hat ? static_cast<T*>(job.y_hat) + b * job.sample : nullptr),
        rate(job.rate ? static_cast<S*>(job.rate) + b * job.sample : nullptr),
        slopes(job.slopes ? static_cast<S*>(job.slopes) + b * job.sample : nullptr) {}
  T* y_hat;
  S *rate, *slopes;
};

// Likelihoods, and which of them lie below their bound: few, once a model has trained for a while, and none as a rule,
// so that what these need is in branches.
template <class M>
struct Likelihood {
  using V = typename M::Value;
  using Rule = RateRule<typename M::Scalar>;
  LIC_FAST_INLINE Likelihood(const Rule& rule, V log_p_, V p_)
      : log_p(log_p_), p(p_), below(M::less(p, rule.bounded ? rule.floor : -1)), some(M::any(below)) {}

  LIC_FAST_INLINE V rate(const Rule& rule) const {
    return some || rule.output == kLikelihood ? rule.rate(log_p, p)
                                              : log_p * static_cast<typename M::Scalar>(-1 / kLn2);
  }
  LIC_FAST_INLINE V slope(const Rule& rule) const {
    return some || rule.output == kLikelihood ? rule.slope(p) : M::all(-1 / kLn2);
  }

  V log_p, p;
  typename M::Mask below;
  bool some;
};

// Slopes of element i and its neighbours, `left` of them.
template <class M>
struct SlopesAt {
  using V = typename M::Value;
  LIC_FAST_INLINE SlopesAt(const MixtureJob& job, const Settings<M>& set, typename M::Scalar* slopes, int64_t i,
                           int64_t left_, const Likelihood<M>& likelihood_)
      : planes(slopes + i),
        plane(job.plane()),
        left(left_),
        streams(job.streams),
        bounded(set.rule.bounded),
        likelihood(likelihood_),
        slope(likelihood_.slope(set.rule)) {}
  LIC_FAST_INLINE void put(int64_t place, V value) const {
    stream_part<M>(planes + place * plane, value, left, streams);
  }
  // A likelihood of 0 far below its bound takes all with it, even what is infinite.
  LIC_FAST_INLINE V held(V value) const { return likelihood.some ? M::select(M::equal(slope, 0), V{}, value) : value; }
  LIC_FAST_INLINE V first(V value) const {
    if (!bounded) return value;
    if (!likelihood.some) return M::cleared(value);
    return M::noted(held(value), M::both(likelihood.below, M::no(M::equal(slope, 0))));
  }

  typename M::Scalar* planes;
  int64_t plane, left;
  bool streams, bounded;
  Likelihood<M> likelihood;
  V slope;
};

template <class M, class T, bool kSlopes, int32_t kFamily>
LIC_FAST_INLINE typename M::Value alone_at(const MixtureJob& job, const Settings<M>& set, const Sample<T>& from,
                                           typename M::Scalar* slopes, typename M::Value d, int64_t i, int64_t left) {
  using V = typename M::Value;
  __builtin_prefetch(from.scales + i + kBlock);
  const V scale = load_part<M>(from.scales + i, left);
  const Density<M> part = density<M, kSlopes>(kFamily, M::abs(d), bounded_scale<M>(scale, set.scale_bound));
  const V log_p = job.output == kLikelihood ? V{} : log_of<M>(kFamily, part);
  const Likelihood<M> result(set.rule, log_p, part.decay * part.factor);
  if constexpr (kSlopes) {
    const SlopesAt<M> at(job, set, slopes, i, left, result);
    const V scaled = at.slope / part.factor;
    at.put(0, at.first(scaled * M::flipped(part.by_d, d)));
    at.put(1, M::noted(at.held(scaled * part.by_s), M::less(scale, set.scale_bound)));
  }
  return result.rate(set.rule);
}

// kCount: how many components, where that is known; else 0.
template <class M, class T, bool kSlopes, int64_t kCount>
LIC_FAST_INLINE typename M::Value mixed_at(const MixtureJob& job, const Settings<M>& set, const Sample<T>& from,
                                           const Parts<M>& parts, typename M::Scalar* slopes, int64_t i, int64_t j,
                                           int64_t left) {
  using V = typename M::Value;
  const int64_t count = kCount > 0 ? kCount : job.components;
  Mixed<M, kCount ? kCount : kMostComponents> mixed;
  const auto weight = [&](int64_t k) __attribute__((always_inline)) {
    __builtin_prefetch(from.weights + k * job.sample + i + kBlock);
    return load_part<M>(from.weights + k * job.sample + i, left);
  };
  const auto component = [&](int64_t k) __attribute__((always_inline)) {
    const auto& part = parts.at[k];
    return Density<M>{M::load(part.exponent + j), M::load(part.factor + j), M::load(part.decay + j), V{}, V{}};
  };
  mix<M>(count, job.logits, weight, component, mixed);
  const Likelihood<M> result(set.rule, mixed.log_p, mixed.p);
  if constexpr (kSlopes) {
    const SlopesAt<M> at(job, set, slopes, i, left, result);
    const V scaled = at.slope / mixed.sum;
    for (int64_t k = 0; k < count; ++k) {
      V own, by_weight;
      share<M>(mixed, k, job.logits, at.slope, scaled, own, by_weight);
      const V by_d = own * M::load(parts.at[k].by_d + j), by_s = M::load(parts.at[k].by_s + j);
      at.put(k, k == 0 ? at.first(by_d) : at.held(by_d));
      at.put(count + k, M::with_note_of(at.held(own * by_s), by_s));
      at.put(2 * count + k, at.held(by_weight));
    }
  }
  return result.rate(set.rule);
}

// kFamily: that of the only component, or -1 for a mixture.
template <class M, class T, bool kSlopes, int32_t kFamily, int64_t kCount>
LIC_FAST_INLINE void forward(const MixtureJob& job, const Stretch& at) {
  using V = typename M::Value;
  using S = typename M::Scalar;
  constexpr bool kMixed = kFamily < 0;
  alignas(64) S noise_room[kNoiseRoom<M>] = {};
  alignas(64) S bits[kBlock + M::kLanes], y_hats[kMixed ? kBlock + M::kLanes : 1];
  Parts<M> parts[kMixed ? 1 : 0];
  const Settings<M> set(job);
  const Sample<T> from(job, at.b);
  const Rooms<T, S> to(job, at.b);
  const bool centred = from.means && !from.weights;
  for (int64_t block = at.begin; block < at.end; block += kBlock) {
    const int64_t n = std::min(kBlock, at.end - block);
    const S* noise = noise_of<M>(job, at, block, n, noise_room);
    if constexpr (kMixed) {
      quantize_block<M>(job, from, noise, block, n, y_hats);
      components_of_block<M, T, kSlopes>(job, set, from, block, n, y_hats, parts[0]);
    }
    for (int64_t j = 0; j < n; j += M::kLanes) {
      const int64_t i = block + j, left = n - j;
      if (centred) __builtin_prefetch(from.means + i + kBlock);
      __builtin_prefetch(from.y + i + kBlock);
      const V mean = centred ? load_part<M>(from.means + i, left) : V{};
      V y_hat, rate;
      if constexpr (kMixed) {
        y_hat = M::load(y_hats + j);
        rate = mixed_at<M, T, kSlopes, kCount>(job, set, from, parts[0], to.slopes, i, j, left);
      } else {
        y_hat = quantized<S>(load_part<M>(from.y + i, left), mean, M::load(noise + j), job.quantize, centred);
        rate = alone_at<M, T, kSlopes, kFamily>(job, set, from, to.slopes, y_hat - mean, i, left);
      }
      if (to.y_hat) store_part<M>(to.y_hat + i, y_hat, left);
      if (to.rate) {
        store_part<M>(to.rate + i, rate, left);
      } else {
        M::store(bits + j, rate);
      }
    }
    if (job.sums) add_to_rows<M>(job, at, block, n, bits);
  }
  if (job.streams) M::fence();
}

template <class M, class T, bool kSlopes>
LIC_FAST_INLINE void forward_by_family(const MixtureJob& job, const Stretch& at) {
  if (job.weights.data && job.components == 3) return forward<M, T, kSlopes, -1, 3>(job, at);
  if (job.weights.data) return forward<M, T, kSlopes, -1, 0>(job, at);
  switch (job.families[0]) {
    case kGaussian: return forward<M, T, kSlopes, kGaussian, 0>(job, at);
    case kLogistic: return forward<M, T, kSlopes, kLogistic, 0>(job, at);
    default: return forward<M, T, kSlopes, kLaplace, 0>(job, at);
  }
}

template <class Isa, bool kSlopes>
LIC_FAST_INLINE void forward_by_type(const MixtureJob& job, const Stretch& at) {
  switch (job.type) {
    case kFloat32: return forward_by_family<VectorMath<Isa>, float, kSlopes>(job, at);
    case kBFloat16: return forward_by_family<VectorMath<Isa>, BFloat16, kSlopes>(job, at);
    default: return forward_by_family<ScalarMath, double, kSlopes>(job, at);
  }
}

}  // namespace
}  // namespace lic_fast
