// What the kernels of factorized_rate.cu are made of: which elements a block and a thread take, how they are read and
// written, and the sums over rows and over a warp.
#pragma once

#include "common/factorized.h"
#include "cuda/device.cuh"

namespace lic_fast {
namespace {

namespace density = factorized;

constexpr int32_t kThreads = 128;
constexpr int32_t kWarps = kThreads / 32;
// Of the backward kernel on a multiprocessor: two leave a thread the 252 registers of its sums and its trail. Three
// would have it write and read 1,100 bytes of them an element, through the unit that also reads the parameters.
constexpr int32_t kBlocksAtOnce = 2;
constexpr int64_t kItem = 1024;
constexpr int32_t kRow = 64;  // sums of a channel, in room for a warp to halve: the parameters, the median, padding
constexpr int32_t kMedian = density::kParameters;

struct DeviceMath {
  static LIC_FAST_ANYWHERE float exp(float x) { return expf(x); }
  static LIC_FAST_ANYWHERE float expm1(float x) { return expm1f(x); }
  static LIC_FAST_ANYWHERE float log(float x) { return logf(x); }
  static LIC_FAST_ANYWHERE float log1p(float x) { return log1pf(x); }
  static LIC_FAST_ANYWHERE float exp_within(float x) { return expf(x); }
  static LIC_FAST_ANYWHERE float expm1_within(float x) { return expm1f(x); }
  static LIC_FAST_ANYWHERE double exp(double x) { return ::exp(x); }
  static LIC_FAST_ANYWHERE double expm1(double x) { return ::expm1(x); }
  static LIC_FAST_ANYWHERE double log(double x) { return ::log(x); }
  static LIC_FAST_ANYWHERE double log1p(double x) { return ::log1p(x); }
  static LIC_FAST_ANYWHERE double exp_within(double x) { return ::exp(x); }
  static LIC_FAST_ANYWHERE double expm1_within(double x) { return ::expm1(x); }
};

template <class Y, class T>
struct Job {
  const Y* y;
  const T* weights;
  const T* medians;     // null where there are none
  const int64_t* seed;  // null but for noise
  const Y* grad_y_hat;  // null where there is none; one element for all where grad_y_hat_one
  const T* grad_rate;
  Y* y_hat;  // null where nothing is quantised
  T* rate;
  Y* grad_y;  // null where not wanted
  T* grad_weights;
  T* grad_medians;
  double* sums;  // forward: bits [samples, channels, parts]; backward: [channels, items, kRow]; null where not needed
  int64_t samples, channels, inner, stride;
  int64_t parts, samples_an_item, items;  // parts of a sample; items of a channel
  RateRule<T> rule;
  int32_t mode;
  bool grad_y_hat_one, grad_rate_one, vector;
};

// What a block works on: n elements of channel c, from element `inside` of sample `sample` on.
struct Item {
  int64_t c, sample, inside, part;
  int32_t n;
};

template <class J>
__device__ __forceinline__ Item item_of(const J& job) {
  Item item;
  const int64_t i = blockIdx.x % job.items;
  item.c = blockIdx.x / job.items;
  if (job.parts == 1) {
    item.sample = i * job.samples_an_item;
    item.part = item.inside = 0;
    item.n = static_cast<int32_t>(min(job.samples_an_item, job.samples - item.sample) * job.inner);
  } else {
    item.sample = i / job.parts;
    item.part = i % job.parts;
    item.inside = item.part * kItem;
    item.n = static_cast<int32_t>(min(kItem, job.inner - item.inside));
  }
  return item;
}

// Four neighbours of an item, at[j] the place of the j-th: in a contiguous tensor, and in y. -1 beyond the item's end.
struct Quad {
  int64_t at[4], in_y[4], row[4];  // row: sample * channels + c
};

template <class J>
__device__ __forceinline__ Quad quad_of(const J& job, const Item& item, int32_t first) {
  Quad q;
  const uint32_t inner = static_cast<uint32_t>(min(job.inner, kItem));  // of more, an item lies inside one sample
#pragma unroll
  for (int32_t j = 0; j < 4; ++j) {
    const uint32_t e = static_cast<uint32_t>(first + j);
    const uint32_t samples = job.parts == 1 ? e / inner : 0;
    const int64_t sample = item.sample + samples, inside = item.inside + (e - samples * inner);
    q.row[j] = sample * job.channels + item.c;
    q.at[j] = first + j < item.n ? q.row[j] * job.inner + inside : -1;
    q.in_y[j] = sample * job.stride + item.c * job.inner + inside;
  }
  return q;
}

template <class From>
__device__ __forceinline__ Four<From> gather(const From* from, const int64_t (&places)[4], const Quad& q, bool vector) {
  if (vector) return *reinterpret_cast<const Four<From>*>(from + places[0]);
  Four<From> result{};
#pragma unroll
  for (int32_t j = 0; j < 4; ++j) {
    if (q.at[j] >= 0) result.at[j] = from[places[j]];
  }
  return result;
}

template <class To>
__device__ __forceinline__ void scatter(To* to, const Quad& q, bool vector, const Four<To>& value) {
  if (vector) {
    *reinterpret_cast<Four<To>*>(to + q.at[0]) = value;
    return;
  }
#pragma unroll
  for (int32_t j = 0; j < 4; ++j) {
    if (q.at[j] >= 0) to[q.at[j]] = value.at[j];
  }
}

// The parameters of a channel as the network takes them, in shared memory.
template <class T>
__device__ __forceinline__ void transform(const T* raw, T* w) {
  for (int32_t p = threadIdx.x; p < density::kParameters; p += kThreads) {
    const density::Kind kind = density::kind(p);
    T value = raw[p];
    if (kind == density::kMatrix) value = density::softplus<DeviceMath, T>(value);
    if (kind == density::kFactor) value = density::hyperbolic_tangent<DeviceMath, T>(value);
    w[p] = value;
  }
  __syncthreads();
}

template <class Y, class T>
__device__ __forceinline__ void read_values(const Job<Y, T>& job, const Item& item, const Quad& q, T (&value)[4]) {
  const Four<Y> y = gather(job.y, q.in_y, q, job.vector);
  T noise[4] = {};
  if (job.mode == kNoise) {
    const int64_t seed = *job.seed;
    if (job.vector) {  // rows of whole vectors: the first is a multiple of four
      uniform4(seed, q.at[0], noise);
    } else {
#pragma unroll
      for (int32_t j = 0; j < 4; ++j) noise[j] = uniform_at<T>(seed, q.at[j]);
    }
  }
  const T centre = job.medians ? job.medians[item.c] : T(0);
#pragma unroll
  for (int32_t j = 0; j < 4; ++j) {
    value[j] = quantized<T>(convert<T>(y.at[j]), centre, noise[j], job.mode, job.medians != nullptr);
  }
}

// Bits by sample of an item: a thread adds a short row, a warp a long one, both in a fixed order.
template <class Y, class T>
__device__ __forceinline__ void add_rows(const Job<Y, T>& job, const Item& item, const T* bits) {
  const int32_t row = job.parts == 1 ? static_cast<int32_t>(job.inner) : item.n, rows = item.n / row;
  const int32_t width = row < 32 ? 1 : 32, lane = static_cast<int32_t>(threadIdx.x) % width;
  for (int32_t r = static_cast<int32_t>(threadIdx.x) / width; r < rows; r += kThreads / width) {
    double sum = 0;
    for (int32_t i = lane; i < row; i += width) sum += static_cast<double>(bits[r * row + i]);
    if (width == 32) {
      for (int32_t step = 16; step > 0; step >>= 1) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
    }
    const int64_t at = (item.sample + r) * job.channels + item.c;
    if (lane != 0) continue;
    if (job.parts == 1) {
      job.rate[at] = static_cast<T>(sum);
    } else {
      job.sums[at * job.parts + item.part] = sum;
    }
  }
}

// Over a warp the sum of each of 64 values; lane l is left with those of value 2 l and 2 l + 1 in the first two places.
template <int32_t kept = kRow / 2, class T>
__device__ __forceinline__ void add_halves(T (&v)[kRow]) {
  if constexpr (kept > 1) {
    constexpr int32_t step = kept / 2;
    const bool upper = threadIdx.x & step;
#pragma unroll
    for (int32_t i = 0; i < kept; ++i) {
      const T sent = upper ? v[i] : v[i + kept], own = upper ? v[i + kept] : v[i];
      v[i] = own + __shfl_xor_sync(0xFFFFFFFFu, sent, step);
    }
    add_halves<kept / 2>(v);
  }
}

// values[j], j not known to the compiler, from registers
template <class T>
__device__ __forceinline__ T pick(const T (&values)[4], int32_t j) {
  const T low = j & 1 ? values[1] : values[0], high = j & 1 ? values[3] : values[2];
  return j & 2 ? high : low;
}

}  // namespace
}  // namespace lic_fast
