// The loops of mixture_rate.cpp over one stretch of one sample, for every dtype, family and instruction set.
//
// A stretch is walked in blocks: their noise is made at once, then vector after vector is loaded, widened, computed and
// stored. A mixture keeps what its components have come to in a few vectors a component on the stack.
#pragma once

#include "common/likelihood.h"
#include "cpu/noise.h"

namespace lic_fast {
namespace {

constexpr int64_t kBlock = 256;  // elements; a multiple of every vector

struct Input {
  const void* data;
  int64_t stride;  // elements from one sample to the next
};

struct Upstream {
  const void* data;  // null: zero
  bool one;          // one element stands for all
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
  double* sums;  // of bits: one a row, or a piece of a row
  Upstream grad_y_hat, grad_rate;
  void *grad_y, *grad_scales, *grad_means, *grad_weights;
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
  alignas(64) S exponent[kMostComponents][kBlock], factor[kMostComponents][kBlock];
  alignas(64) S by_d[kMostComponents][kBlock], by_s[kMostComponents][kBlock];
};

template <class M, class T, bool kGradients, int32_t kFamily>
LIC_FAST_INLINE void component_block(const Settings<M>& set, const T* means, const T* scales,
                                     const typename M::Scalar* y_hat, int64_t n, int64_t k, Parts<M>& parts) {
  using V = typename M::Value;
  for (int64_t j = 0; j < n; j += M::kLanes) {
    const V d = M::load(y_hat + j) - load_part<M>(means + j, n - j);
    const V s = bounded_scale<M>(load_part<M>(scales + j, n - j), set.scale_bound);
    const Density<M> part = density<M, kGradients>(kFamily, M::abs(d), s);
    M::store(parts.exponent[k] + j, part.exponent);
    M::store(parts.factor[k] + j, part.factor);
    if constexpr (kGradients) {
      M::store(parts.by_d[k] + j, M::select(d < 0, -part.by_d, part.by_d));
      M::store(parts.by_s[k] + j, part.by_s);
    }
  }
}

template <class M, class T, bool kGradients>
LIC_FAST_INLINE void components_of_block(const MixtureJob& job, const Settings<M>& set, const Sample<T>& from,
                                         int64_t i, int64_t n, const typename M::Scalar* y_hat, Parts<M>& parts) {
  for (int64_t k = 0; k < job.components; ++k) {
    const T *means = from.means + k * job.sample + i, *scales = from.scales + k * job.sample + i;
    switch (job.families[k]) {
      case kGaussian: component_block<M, T, kGradients, kGaussian>(set, means, scales, y_hat, n, k, parts); break;
      case kLogistic: component_block<M, T, kGradients, kLogistic>(set, means, scales, y_hat, n, k, parts); break;
      default: component_block<M, T, kGradients, kLaplace>(set, means, scales, y_hat, n, k, parts);
    }
  }
}

// Mixes elements j, j + 1, ... of the block that begins at element i of the sample.
template <class M, class T>
LIC_FAST_INLINE void mix_at(const MixtureJob& job, const Sample<T>& from, const Parts<M>& parts, int64_t i, int64_t j,
                            int64_t n, Mixed<M, kMostComponents>& mixed) {
  using V = typename M::Value;
  const auto component = [&](int64_t k, V& weight, V& exponent, V& factor) __attribute__((always_inline)) {
    weight = load_part<M>(from.weights + k * job.sample + i + j, n - j);
    exponent = M::load(parts.exponent[k] + j);
    factor = M::load(parts.factor[k] + j);
  };
  mix<M>(job.components, job.logits, component, mixed);
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

// kFamily: that of the only component, or -1 for a mixture.
template <class M, class T, int32_t kFamily>
LIC_FAST_INLINE void forward(const MixtureJob& job, const Stretch& at) {
  using V = typename M::Value;
  using S = typename M::Scalar;
  alignas(64) S noise_room[kNoiseRoom<M>] = {};
  alignas(64) S bits[kBlock + M::kLanes], y_hats[kFamily < 0 ? kBlock + M::kLanes : 1];
  Parts<M> parts[kFamily < 0 ? 1 : 0];
  const Settings<M> set(job);
  const Sample<T> from(job, at.b);
  const bool centred = from.means && !from.weights;
  T* y_hat_out = job.y_hat ? static_cast<T*>(job.y_hat) + at.b * job.sample : nullptr;
  S* rate_out = job.rate ? static_cast<S*>(job.rate) + at.b * job.sample : nullptr;
  Mixed<M, kMostComponents> mixed;
  for (int64_t block = at.begin; block < at.end; block += kBlock) {
    const int64_t n = std::min(kBlock, at.end - block);
    const S* noise = noise_of<M>(job, at, block, n, noise_room);
    if constexpr (kFamily < 0) {
      quantize_block<M>(job, from, noise, block, n, y_hats);
      components_of_block<M, T, false>(job, set, from, block, n, y_hats, parts[0]);
    }
    for (int64_t j = 0; j < n; j += M::kLanes) {
      const int64_t i = block + j, left = n - j;
      const V mean = centred ? load_part<M>(from.means + i, left) : V{};
      const V y_hat = quantized<S>(load_part<M>(from.y + i, left), mean, M::load(noise + j), job.quantize, centred);
      if (y_hat_out) store_part<M>(y_hat_out + i, y_hat, left);
      V log_p;
      if constexpr (kFamily >= 0) {
        const V s = bounded_scale<M>(load_part<M>(from.scales + i, left), set.scale_bound);
        const Density<M> part = density<M, false>(kFamily, M::abs(y_hat - mean), s);
        log_p = part.exponent + M::log(part.factor);
      } else {
        mix_at<M>(job, from, parts[0], block, j, n, mixed);
        log_p = mixed.log_p;
      }
      const V rate = set.rule.template rate<M>(log_p);
      if (rate_out) {
        store_part<M>(rate_out + i, rate, left);
      } else {
        M::store(bits + j, rate);
      }
    }
    if (job.sums) add_to_rows<M>(job, at, block, n, bits);
  }
}

// The upstream gradient of the rate of elements [i, i + n) of a sample, where it is given by rows.
template <class M>
LIC_FAST_INLINE void spread_rows(const MixtureJob& job, const Stretch& at, int64_t i, int64_t n,
                                 typename M::Scalar* grad) {
  const typename M::Scalar* rows =
      static_cast<const typename M::Scalar*>(job.grad_rate.data) + at.b * (job.sample / job.inner);
  for (int64_t j = 0; j < n;) {
    const int64_t row = (i + j) / job.inner, end = std::min(n, (row + 1) * job.inner - i);
    for (; j < end; ++j) grad[j] = rows[row];
  }
}

// Where the gradients of a stretch go; null where not asked for.
template <class T>
struct Rooms {
  Rooms(const MixtureJob& job, int64_t b)
      : y(at(job.grad_y, b * job.sample)),
        scales(at(job.grad_scales, b * job.sample * job.components)),
        means(at(job.grad_means, b * job.sample * job.components)),
        weights(at(job.grad_weights, b * job.sample * job.components)) {}
  static T* at(void* room, int64_t offset) { return room ? static_cast<T*>(room) + offset : nullptr; }
  T *y, *scales, *means, *weights;
};

template <class M, class T, class G>
LIC_FAST_INLINE typename M::Value upstream_at(const Upstream& grad, int64_t place, int64_t n) {
  if (!grad.data) return typename M::Value{};
  const G* data = static_cast<const G*>(grad.data);
  if (grad.one) return M::all(convert<typename M::Scalar>(*data));
  return load_part<M>(data + place, n);
}

// One component's gradients by log p's share in it: of the scale and the mean; returns that of d.
template <class M, class T>
LIC_FAST_INLINE typename M::Value component_grads(const MixtureJob& job, const Settings<M>& set, const Sample<T>& from,
                                                  const Rooms<T>& to, int64_t place, int64_t n,
                                                  typename M::Value weight, typename M::Value by_d,
                                                  typename M::Value by_s) {
  using V = typename M::Value;
  const V grad_d = weight * by_d;
  if (to.scales) {
    const V scale = load_part<M>(from.scales + place, n);
    store_part<M>(to.scales + place, through_bound<M>(weight * by_s, scale, set.scale_bound), n);
  }
  if (to.means && (job.weights.data || job.quantize != kDequantize)) store_part<M>(to.means + place, -grad_d, n);
  return grad_d;
}

template <class M, class T, int32_t kFamily>
LIC_FAST_INLINE void backward(const MixtureJob& job, const Stretch& at) {
  using V = typename M::Value;
  using S = typename M::Scalar;
  alignas(64) S noise_room[kNoiseRoom<M>] = {};
  alignas(64) S by_row[kBlock + M::kLanes] = {}, y_hats[kFamily < 0 ? kBlock + M::kLanes : 1];
  Parts<M> parts[kFamily < 0 ? 1 : 0];
  const Settings<M> set(job);
  const Sample<T> from(job, at.b);
  const Rooms<T> to(job, at.b);
  const bool centred = from.means && !from.weights, follows = job.quantize == kDequantize;
  const bool rows = job.output == kBitsPerChannel && job.grad_rate.data && !job.grad_rate.one;
  const bool needs_p = job.output == kLikelihood || job.likelihood_bound > 0;
  Mixed<M, kMostComponents> mixed;
  for (int64_t block = at.begin; block < at.end; block += kBlock) {
    const int64_t n = std::min(kBlock, at.end - block);
    const S* noise = noise_of<M>(job, at, block, n, noise_room);
    if (rows) spread_rows<M>(job, at, block, n, by_row);
    if constexpr (kFamily < 0) {
      quantize_block<M>(job, from, noise, block, n, y_hats);
      components_of_block<M, T, true>(job, set, from, block, n, y_hats, parts[0]);
    }
    for (int64_t j = 0; j < n; j += M::kLanes) {
      const int64_t i = block + j, left = n - j, global = at.b * job.sample + i;
      const V mean = centred ? load_part<M>(from.means + i, left) : V{};
      const V y_hat = quantized<S>(load_part<M>(from.y + i, left), mean, M::load(noise + j), job.quantize, centred);
      const V grad = rows ? M::load(by_row + j) : upstream_at<M, T, S>(job.grad_rate, global, left);
      const V through = upstream_at<M, T, T>(job.grad_y_hat, global, left);
      V grad_y = V{};
      if constexpr (kFamily >= 0) {
        const V s = bounded_scale<M>(load_part<M>(from.scales + i, left), set.scale_bound);
        const V d = y_hat - mean;
        const Density<M> part = density<M, true>(kFamily, M::abs(d), s);
        const V g = set.rule.template upstream<M>(grad, needs_p ? part.exponent + M::log(part.factor) : V{});
        const V by_d = M::select(d < 0, -part.by_d, part.by_d);
        grad_y = component_grads<M>(job, set, from, to, i, left, g, by_d, part.by_s);
      } else {
        mix_at<M>(job, from, parts[0], block, j, n, mixed);
        const V g = set.rule.template upstream<M>(grad, mixed.log_p), scaled = g / mixed.sum;
        for (int64_t k = 0; k < job.components; ++k) {
          const int64_t place = k * job.sample + i;
          V own, grad_weight;
          share<M>(mixed, k, job.logits, g, scaled, own, grad_weight);
          const V by_d = M::load(parts[0].by_d[k] + j), by_s = M::load(parts[0].by_s[k] + j);
          grad_y = grad_y + component_grads<M>(job, set, from, to, place, left, own, by_d, by_s);
          if (to.weights) store_part<M>(to.weights + place, grad_weight, left);
        }
      }
      if (follows && centred && to.means) store_part<M>(to.means + i, through, left);
      if (to.y) store_part<M>(to.y + i, follows ? V{} : grad_y + through, left);
    }
  }
}

template <class M, class T>
LIC_FAST_INLINE void forward_by_family(const MixtureJob& job, const Stretch& at) {
  if (job.weights.data) return forward<M, T, -1>(job, at);
  switch (job.families[0]) {
    case kGaussian: return forward<M, T, kGaussian>(job, at);
    case kLogistic: return forward<M, T, kLogistic>(job, at);
    default: return forward<M, T, kLaplace>(job, at);
  }
}

template <class M, class T>
LIC_FAST_INLINE void backward_by_family(const MixtureJob& job, const Stretch& at) {
  if (job.weights.data) return backward<M, T, -1>(job, at);
  switch (job.families[0]) {
    case kGaussian: return backward<M, T, kGaussian>(job, at);
    case kLogistic: return backward<M, T, kLogistic>(job, at);
    default: return backward<M, T, kLaplace>(job, at);
  }
}

template <class Isa>
LIC_FAST_INLINE void forward_stretch_body(const MixtureJob& job, const Stretch& at) {
  switch (job.type) {
    case kFloat32: return forward_by_family<VectorMath<Isa>, float>(job, at);
    case kBFloat16: return forward_by_family<VectorMath<Isa>, BFloat16>(job, at);
    default: return forward_by_family<ScalarMath, double>(job, at);
  }
}

template <class Isa>
LIC_FAST_INLINE void backward_stretch_body(const MixtureJob& job, const Stretch& at) {
  switch (job.type) {
    case kFloat32: return backward_by_family<VectorMath<Isa>, float>(job, at);
    case kBFloat16: return backward_by_family<VectorMath<Isa>, BFloat16>(job, at);
    default: return backward_by_family<ScalarMath, double>(job, at);
  }
}

}  // namespace
}  // namespace lic_fast
