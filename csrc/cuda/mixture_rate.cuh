// The kernels of mixture_rate.cu.
#pragma once

#include <type_traits>

#include "common/likelihood.h"
#include "cuda/device_math.cuh"

namespace lic_fast {
namespace {

constexpr int32_t kThreads = 256;
constexpr int32_t kAlone = 0;       // what kMost says of a density without weights
constexpr int32_t kAnyFamily = -1;  // what kFamily says of families known at the launch
constexpr int64_t kLongRow = 2048;  // from here on a block adds a row, below a warp
constexpr int64_t kPart = 1 << 14;  // longer rows are added in parts, a block each
constexpr int64_t kMostBlocks = 65535;

// Blocks that a multiprocessor must hold; 0: as the compiler likes. For two components it likes to spill a few
// registers that three blocks leave it.
template <int32_t kMost>
constexpr int32_t kBlocksAtOnce = kMost == 2 ? 3 : 0;

template <class T>
using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

struct Input {
  const void* data;
  int64_t stride;
};

struct Upstream {
  const void* data;
  bool one;
};

struct Job {
  Input y, scales, means, weights;
  int64_t batch, sample, channels, inner, components;
  uint64_t inverse_inner;  // 2^64 / inner, rounded down
  const int64_t* seed;
  int32_t families[kMostComponents];
  int32_t quantize, output;
  bool logits, vector;
  double scale_bound, likelihood_bound;
  void *y_hat, *rate;
  Upstream grad_y_hat, grad_rate;
  void *grad_y, *grad_scales, *grad_means, *grad_weights;
};

template <class T>
__device__ __forceinline__ Four<T> input4(const Input& input, int64_t b, int64_t i, int64_t end, bool vector) {
  return load4(static_cast<const T*>(input.data) + b * input.stride, i, end, vector);
}

// y_hat and the mean it was rounded about, of elements [i, i + 4) of sample b.
template <class T, class S>
__device__ __forceinline__ void quantize4(const Job& job, int64_t b, int64_t i, int64_t end, S (&y_hat)[4],
                                          S (&mean)[4]) {
  const bool centred = job.means.data && !job.weights.data;
  const Four<T> y = input4<T>(job.y, b, i, end, job.vector);
  Four<T> m{};
  if (centred) m = input4<T>(job.means, b, i, end, job.vector);
  S u[4] = {};
  if (job.quantize == kNoise) uniform4(*job.seed, b * job.sample + i, u);
#pragma unroll
  for (int32_t e = 0; e < 4; ++e) {
    const S value = convert<S>(y.at[e]);
    mean[e] = centred ? convert<S>(m.at[e]) : S(0);
    switch (job.quantize) {  // unfused: the same bits on every backend
      case kNotQuantized: y_hat[e] = value; break;
      case kNoise: y_hat[e] = add(value, u[e]); break;
      default:
        y_hat[e] = centred ? add(DeviceMath<S>::round(add(value, -mean[e])), mean[e]) : DeviceMath<S>::round(value);
    }
  }
}

template <class T>
struct Parameters {  // of one component, four elements
  Four<T> scale, mean, weight;
};

template <class T>
__device__ __forceinline__ Parameters<T> parameters4(const Job& job, int64_t k, int64_t b, int64_t i, int64_t end) {
  const int64_t shift = k * job.sample;
  return {input4<T>(job.scales, b, shift + i, shift + end, job.vector),
          input4<T>(job.means, b, shift + i, shift + end, job.vector),
          input4<T>(job.weights, b, shift + i, shift + end, job.vector)};
}

template <class S, int64_t kMost>
struct MixedGradients : Mixed<DeviceMath<S>, kMost> {  // with the components' derivatives, signed
  S by_d[kMost], by_s[kMost];
};

// How a mixture of kMost components (as many, if they are few, else at most) goes through its four elements: at once,
// or where the code would be long or registers short, one after the other. Registers have no index, so that there the
// element is always the first, and the four turn.
template <int64_t kMost, int32_t kFamily>
struct Walk {
  static constexpr bool kExact = kMost <= kFewComponents;
  static constexpr bool kTurns = kExact && (kFamily == kAnyFamily || kMost > 3);
  static constexpr int32_t kAtOnce = kExact && !kTurns ? 4 : 1;

  static __device__ __forceinline__ int64_t components(const Job& job) { return kExact ? kMost : job.components; }
  static __device__ __forceinline__ int32_t place(int32_t e) { return kTurns ? 0 : e; }

  template <class V>
  static __device__ __forceinline__ void turn(V (&four)[4]) {
    if constexpr (kTurns) {
      const V first = four[0];
      four[0] = four[1], four[1] = four[2], four[2] = four[3], four[3] = first;
    }
  }

  template <class T>
  static __device__ __forceinline__ void load(const Job& job, int64_t b, int64_t i, int64_t end,
                                              Parameters<T> (&loaded)[kMost]) {
    LIC_FAST_UNROLL_FEW
    for (int64_t k = 0; k < kMost; ++k) {
      if (k >= components(job)) break;
      loaded[k] = parameters4<T>(job, k, b, i, end);
    }
  }

  template <class T>
  static __device__ __forceinline__ void turn(Parameters<T> (&loaded)[kMost]) {
    LIC_FAST_UNROLL_FEW
    for (int64_t k = 0; kTurns && k < kMost; ++k) {
      turn(loaded[k].scale.at);
      turn(loaded[k].mean.at);
      turn(loaded[k].weight.at);
    }
  }

  template <bool kGradients, class T, class S>
  static __device__ __forceinline__ void mix_one(const Job& job, const Parameters<T> (&loaded)[kMost], int32_t at,
                                                 S y_hat, MixedGradients<S, kMost>& mixed) {
    using M = DeviceMath<S>;
    Density<M> parts[kMost];
    LIC_FAST_UNROLL_FEW
    for (int64_t k = 0; k < kMost; ++k) {
      if (k >= components(job)) break;
      const S d = add(y_hat, -convert<S>(loaded[k].mean.at[at]));
      const S s = bounded_scale<M>(convert<S>(loaded[k].scale.at[at]), static_cast<S>(job.scale_bound));
      const int32_t family = kFamily == kAnyFamily ? job.families[k] : kFamily;
      parts[k] = density<M, kGradients>(family, M::abs(d), s);
      if constexpr (kGradients) {
        mixed.by_d[k] = d < S(0) ? -parts[k].by_d : parts[k].by_d;
        mixed.by_s[k] = parts[k].by_s;
      }
    }
    const auto weight = [&](int64_t k) { return convert<S>(loaded[k].weight.at[at]); };
    const auto component = [&](int64_t k) { return parts[k]; };
    mix<M>(components(job), job.logits, weight, component, mixed);
  }
};

// The rates of elements [i, i + 4) of sample b; y_hat is stored.
template <class T, int32_t kMost, int32_t kFamily, class S>
__device__ __forceinline__ void forward4(const Job& job, const RateRule<S>& rule, int64_t b, int64_t i, int64_t end,
                                         S (&rate)[4]) {
  using M = DeviceMath<S>;
  S y_hat[4], mean[4], log_p[4];
  quantize4<T>(job, b, i, end, y_hat, mean);
  if constexpr (kMost == kAlone) {
    const Four<T> scale = input4<T>(job.scales, b, i, end, job.vector);
#pragma unroll
    for (int32_t e = 0; e < 4; ++e) {
      const S s = bounded_scale<M>(convert<S>(scale.at[e]), static_cast<S>(job.scale_bound));
      const Density<M> part = density<M, false>(kFamily, M::abs(add(y_hat[e], -mean[e])), s);
      log_p[e] = log_of<M>(kFamily, part);
    }
  } else {
    using Walk = Walk<kMost, kFamily>;
    Parameters<T> loaded[kMost];
    Walk::load(job, b, i, end, loaded);
#pragma unroll(Walk::kAtOnce)
    for (int32_t e = 0; e < 4; ++e) {
      const int32_t at = Walk::place(e);
      MixedGradients<S, kMost> mixed;
      Walk::template mix_one<false>(job, loaded, at, y_hat[at], mixed);
      log_p[at] = mixed.log_p;
      Walk::turn(log_p);
      Walk::turn(y_hat);
      Walk::turn(loaded);
    }
  }
#pragma unroll
  for (int32_t e = 0; e < 4; ++e) rate[e] = rule.template rate<M>(log_p[e]);
  if (!job.y_hat) return;
  Four<T> rounded;
#pragma unroll
  for (int32_t e = 0; e < 4; ++e) rounded.at[e] = convert<T>(y_hat[e]);
  store4(static_cast<T*>(job.y_hat) + b * job.sample, i, end, job.vector, rounded);
}

template <class T, int32_t kMost, int32_t kFamily>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<kMost>)
    mixture_rate_kernel(const __grid_constant__ Job job, const RateRule<Arithmetic<T>> rule) {
  using S = Arithmetic<T>;
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * 4;
  if (i >= job.sample) return;
  for (int64_t b = blockIdx.y; b < job.batch; b += gridDim.y) {
    S rate[4];
    forward4<T, kMost, kFamily>(job, rule, b, i, job.sample, rate);
    Four<S> out;
#pragma unroll
    for (int32_t e = 0; e < 4; ++e) out.at[e] = rate[e];
    store4(static_cast<S*>(job.rate) + b * job.sample, i, job.sample, job.vector, out);
  }
}

// A row (b, c), or each of its parts, by `lanes` threads, 32 or kThreads. sums: [B, C, parts], read where parts > 1.
template <class T, int32_t kMost, int32_t kFamily>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<kMost>)
    mixture_rate_rows_kernel(const __grid_constant__ Job job, const RateRule<Arithmetic<T>> rule, uint32_t lanes,
                             uint32_t parts, double* sums) {
  using S = Arithmetic<T>;
  __shared__ double partial[kThreads / 32];
  const uint32_t unit = blockIdx.x * (kThreads / lanes) + threadIdx.x / lanes, lane = threadIdx.x % lanes;
  const uint32_t part = parts > 1 ? unit % parts : 0;
  const int64_t c = parts > 1 ? unit / parts : unit, begin = c * job.inner + part * kPart;
  const int64_t end = min(begin + kPart, (c + 1) * job.inner);
  for (int64_t b = blockIdx.y; b < job.batch; b += gridDim.y) {  // no thread leaves: all add
    double sum = 0;
    if (c < job.channels) {
      for (int64_t i = begin + lane * 4; i < end; i += lanes * 4) {
        S rate[4];
        forward4<T, kMost, kFamily>(job, rule, b, i, end, rate);
#pragma unroll
        for (int32_t e = 0; e < 4; ++e) sum += i + e < end ? static_cast<double>(rate[e]) : 0.0;
      }
    }
    for (int32_t step = 16; step > 0; step >>= 1) sum += __shfl_down_sync(0xFFFFFFFFu, sum, step);
    if (lanes > 32) {
      if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
      __syncthreads();
      sum = 0;
      for (int32_t w = 0; w < kThreads / 32; ++w) sum += partial[w];
      __syncthreads();  // before the next sample's
    }
    if (c >= job.channels || lane != 0) continue;
    const int64_t row = b * job.channels + c;
    if (parts > 1) {
      sums[row * parts + part] = sum;
    } else {
      static_cast<S*>(job.rate)[row] = static_cast<S>(sum);
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    mixture_rate_parts_kernel(const double* sums, int64_t rows, int64_t parts, S* rate) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= rows) return;
  double sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += sums[row * parts + part];
  rate[row] = static_cast<S>(sum);
}

// i / inner for 0 <= i < 2^63: a quotient at most one too small, set right. A division of 64 bits is a call.
__device__ __forceinline__ int64_t row_of(const Job& job, int64_t i) {
  const int64_t row = static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(i), job.inverse_inner));
  return i - row * job.inner >= job.inner ? row + 1 : row;
}

template <class T, class S>
__device__ __forceinline__ void upstream4(const Upstream& grad, int64_t offset, int64_t i, int64_t end, bool vector,
                                          S (&out)[4]) {
  Four<T> loaded{};
  if (grad.data && !grad.one) loaded = load4(static_cast<const T*>(grad.data) + offset, i, end, vector);
  const S one = grad.data && grad.one ? convert<S>(*static_cast<const T*>(grad.data)) : S(0);
#pragma unroll
  for (int32_t e = 0; e < 4; ++e) out[e] = grad.one ? one : convert<S>(loaded.at[e]);
}

template <class T>
__device__ __forceinline__ void put4(void* room, int64_t offset, int64_t i, int64_t end, bool vector,
                                     const Four<T>& value) {
  if (room) store4(static_cast<T*>(room) + offset, i, end, vector, value);
}

template <class T, int32_t kMost, int32_t kFamily, class S>
__device__ __forceinline__ void backward4(const Job& job, const RateRule<S>& rule, int64_t b, int64_t i, S (&grad)[4],
                                          S (&through)[4]) {
  using M = DeviceMath<S>;
  const S bound = static_cast<S>(job.scale_bound);
  const bool follows = job.quantize == kDequantize;
  S y_hat[4], mean[4];
  quantize4<T>(job, b, i, job.sample, y_hat, mean);
  Four<T> grad_y;
  if constexpr (kMost == kAlone) {
    const bool needs_p = job.output == kLikelihood || job.likelihood_bound > 0;
    const Four<T> scale = input4<T>(job.scales, b, i, job.sample, job.vector);
    Four<T> grad_s, grad_m;
#pragma unroll
    for (int32_t e = 0; e < 4; ++e) {
      const S raw = convert<S>(scale.at[e]), d = add(y_hat[e], -mean[e]);
      const Density<M> part = density<M, true>(kFamily, M::abs(d), bounded_scale<M>(raw, bound));
      const S g = rule.template upstream<M>(grad[e], needs_p ? log_of<M>(kFamily, part) : S(0)) / part.factor;
      const S grad_d = g * (d < 0 ? -part.by_d : part.by_d);
      grad_s.at[e] = convert<T>(through_bound<M>(g * part.by_s, raw, bound));
      grad_m.at[e] = convert<T>(follows ? through[e] : -grad_d);
      grad_y.at[e] = convert<T>(follows ? S(0) : grad_d + through[e]);
    }
    put4(job.grad_scales, b * job.sample, i, job.sample, job.vector, grad_s);
    put4(job.grad_means, b * job.sample, i, job.sample, job.vector, grad_m);
  } else {
    using Walk = Walk<kMost, kFamily>;
    Parameters<T> loaded[kMost];  // and, element by element, their gradients
    Walk::load(job, b, i, job.sample, loaded);
#pragma unroll(Walk::kAtOnce)
    for (int32_t e = 0; e < 4; ++e) {
      const int32_t at = Walk::place(e);
      MixedGradients<S, kMost> mixed;
      Walk::template mix_one<true>(job, loaded, at, y_hat[at], mixed);
      const S g = rule.template upstream<M>(grad[at], mixed.log_p), scaled = g / mixed.sum;
      S sum = through[at];
      LIC_FAST_UNROLL_FEW
      for (int64_t k = 0; k < kMost; ++k) {
        if (k >= Walk::components(job)) break;
        S own, grad_weight;
        share<M>(mixed, k, job.logits, g, scaled, own, grad_weight);
        const S raw = convert<S>(loaded[k].scale.at[at]), grad_d = own * mixed.by_d[k];
        sum += grad_d;
        loaded[k].scale.at[at] = convert<T>(through_bound<M>(own * mixed.by_s[k], raw, bound));
        loaded[k].mean.at[at] = convert<T>(-grad_d);
        loaded[k].weight.at[at] = convert<T>(grad_weight);
      }
      grad_y.at[at] = convert<T>(follows ? S(0) : sum);
      Walk::turn(y_hat);
      Walk::turn(grad);
      Walk::turn(through);
      Walk::turn(grad_y.at);
      Walk::turn(loaded);
    }
    LIC_FAST_UNROLL_FEW
    for (int64_t k = 0; k < kMost; ++k) {
      if (k >= Walk::components(job)) break;
      const int64_t shift = k * job.sample, offset = b * job.sample * job.components + shift;
      put4(job.grad_scales, offset, i, job.sample, job.vector, loaded[k].scale);
      put4(job.grad_means, offset, i, job.sample, job.vector, loaded[k].mean);
      put4(job.grad_weights, offset, i, job.sample, job.vector, loaded[k].weight);
    }
  }
  put4(job.grad_y, b * job.sample, i, job.sample, job.vector, grad_y);
}

template <class T, int32_t kMost, int32_t kFamily>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<kMost>)
    mixture_rate_bwd_kernel(const __grid_constant__ Job job, const RateRule<Arithmetic<T>> rule) {
  using S = Arithmetic<T>;
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * 4;
  if (i >= job.sample) return;
  const bool rows = job.output == kBitsPerChannel && job.grad_rate.data && !job.grad_rate.one;
  for (int64_t b = blockIdx.y; b < job.batch; b += gridDim.y) {
    S grad[4], through[4];
    if (rows) {
      const S* by_row = static_cast<const S*>(job.grad_rate.data) + b * job.channels;
      int64_t row = row_of(job, i), left = (row + 1) * job.inner - i;
#pragma unroll
      for (int32_t e = 0; e < 4; ++e) {
        grad[e] = i + e < job.sample ? by_row[row] : S(0);
        if (--left == 0) ++row, left = job.inner;
      }
    } else {
      upstream4<S>(job.grad_rate, b * job.sample, i, job.sample, job.vector, grad);
    }
    upstream4<T>(job.grad_y_hat, b * job.sample, i, job.sample, job.vector, through);
    backward4<T, kMost, kFamily>(job, rule, b, i, grad, through);
  }
}

}  // namespace
}  // namespace lic_fast
