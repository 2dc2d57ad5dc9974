// The loops of mixture_rate.cpp's gradients over one stretch of one sample: the slopes that the forward pass left,
// times the upstream gradient, through the bounds.
//
// A block after the other, and in it a component after the other, so that memory is read and written in few streams at
// a time.
#pragma once

#include "cpu/mixture_rate.h"

namespace lic_fast {
namespace {

struct Upstream {
  const void* data;  // null: zero
  bool one;          // one element stands for all
};

struct GradientJob {
  const void* slopes;
  int64_t batch, sample, inner, components;
  int32_t type, quantize, output;
  bool mixed, streams;  // streams: the gradients go past the caches
  double likelihood_bound;
  Upstream grad_y_hat, grad_rate;
  void *grad_y, *grad_scales, *grad_means, *grad_weights;  // null where not asked for
};

// The upstream gradient of the rate of elements [i, i + n) of a sample, where it is given by rows.
template <class S>
LIC_FAST_INLINE void spread_rows(const GradientJob& job, int64_t b, int64_t i, int64_t n, S* grad) {
  const S* rows = static_cast<const S*>(job.grad_rate.data) + b * (job.sample / job.inner);
  for (int64_t j = 0; j < n;) {
    const int64_t row = (i + j) / job.inner, end = std::min(n, (row + 1) * job.inner - i);
    for (; j < end; ++j) grad[j] = rows[row];
  }
}

// That of a block as it goes on to the slopes.
template <class M>
LIC_FAST_INLINE void upstream_block(const GradientJob& job, int64_t b, int64_t i, int64_t n, typename M::Scalar* grad) {
  using S = typename M::Scalar;
  const int64_t place = b * job.sample + i;
  const S* data = static_cast<const S*>(job.grad_rate.data);
  if (data && !job.grad_rate.one && job.output == kBitsPerChannel) {
    spread_rows(job, b, i, n, grad);
  } else if (data && !job.grad_rate.one) {
    std::memcpy(grad, data + place, n * sizeof(S));
  } else {
    std::fill_n(grad, n, data ? *data : S(0));
  }
  if (job.likelihood_bound <= 0) return;
  const S* noted = static_cast<const S*>(job.slopes) + place;
  const auto none = typename M::Value{};
  for (int64_t j = 0; j < n; j += M::kLanes) {
    const auto g = M::load(grad + j), raised = job.output == kLikelihood ? -g : g;
    const auto stopped = M::both(M::note(load_part<M>(noted + j, n - j)), M::no(M::less(none, raised)));
    M::store(grad + j, M::select(stopped, none, g));
  }
}

template <class T>
T* at_place(void* room, int64_t offset) {
  return room ? static_cast<T*>(room) + offset : nullptr;
}

// Elements [i, i + n) of sample b for component k; what comes to y is added to by_y, or is it for the first one.
template <class M, class T>
LIC_FAST_INLINE void component_gradients(const GradientJob& job, int64_t b, int64_t i, int64_t n, int64_t k,
                                         const typename M::Scalar* grad, typename M::Scalar* by_y) {
  using V = typename M::Value;
  using S = typename M::Scalar;
  const int64_t plane = job.batch * job.sample, place = b * job.sample + i;
  const int64_t out = (b * job.components + k) * job.sample + i;
  const S* by_d = static_cast<const S*>(job.slopes) + k * plane + place;
  const S *by_scale = by_d + job.components * plane, *by_weight = by_scale + job.components * plane;
  const bool means = job.mixed || job.quantize != kDequantize;
  T *to_scales = at_place<T>(job.grad_scales, out), *to_weights = at_place<T>(job.grad_weights, out);
  T* to_means = means ? at_place<T>(job.grad_means, out) : nullptr;
  for (int64_t j = 0; j < n; j += M::kLanes) {
    const int64_t left = n - j;
    __builtin_prefetch(by_d + j + kBlock);
    __builtin_prefetch(by_scale + j + kBlock);
    if (to_weights) __builtin_prefetch(by_weight + j + kBlock);
    const V g = M::load(grad + j), grad_d = g * load_part<M>(by_d + j, left);
    M::store(by_y + j, k == 0 ? grad_d : M::load(by_y + j) + grad_d);
    if (to_means) stream_part<M>(to_means + j, -grad_d, left, job.streams);
    if (to_scales) {
      const V slope = load_part<M>(by_scale + j, left), grad_s = g * slope;
      const auto stopped = M::both(M::note(slope), M::no(M::less(grad_s, V{})));
      stream_part<M>(to_scales + j, M::select(stopped, V{}, grad_s), left, job.streams);
    }
    if (to_weights) stream_part<M>(to_weights + j, g * load_part<M>(by_weight + j, left), left, job.streams);
  }
}

template <class M, class T>
LIC_FAST_INLINE void backward(const GradientJob& job, const Stretch& at) {
  using V = typename M::Value;
  using S = typename M::Scalar;
  alignas(64) S grad[kBlock + M::kLanes] = {}, by_y[kBlock + M::kLanes] = {};
  const bool follows = job.quantize == kDequantize, one = job.grad_y_hat.one;
  const T* incoming = static_cast<const T*>(job.grad_y_hat.data);
  for (int64_t i = at.begin; i < at.end; i += kBlock) {
    const int64_t n = std::min(kBlock, at.end - i), place = at.b * job.sample + i;
    upstream_block<M>(job, at.b, i, n, grad);
    for (int64_t k = 0; k < job.components; ++k) component_gradients<M, T>(job, at.b, i, n, k, grad, by_y);
    T* to_y = at_place<T>(job.grad_y, place);
    T* to_means = follows && !job.mixed ? at_place<T>(job.grad_means, place) : nullptr;
    for (int64_t j = 0; (to_y || to_means) && j < n; j += M::kLanes) {
      const int64_t left = n - j;
      V through = V{};
      if (incoming) through = one ? M::all(convert<S>(*incoming)) : load_part<M>(incoming + place + j, left);
      if (to_means) stream_part<M>(to_means + j, through, left, job.streams);
      if (to_y) stream_part<M>(to_y + j, follows ? V{} : M::load(by_y + j) + through, left, job.streams);
    }
  }
  if (job.streams) M::fence();
}

template <class Isa>
LIC_FAST_INLINE void backward_by_type(const GradientJob& job, const Stretch& at) {
  switch (job.type) {
    case kFloat32: return backward<VectorMath<Isa>, float>(job, at);
    case kBFloat16: return backward<VectorMath<Isa>, BFloat16>(job, at);
    default: return backward<ScalarMath, double>(job, at);
  }
}

}  // namespace
}  // namespace lic_fast
