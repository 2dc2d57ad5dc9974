// Rate of a latent under CompressAI's EntropyBottleneck, and its gradients; common/factorized.h has the density.
//
// Compute-bound: 12 units of two exponentials and a division an element each way, against 8 to 24 bytes of traffic. So
// a channel's parameters are transformed once, and its elements, over all samples, stream through the network in
// groups of kGroup lanes: a hyper-latent has few elements in a row, many in a channel. An item of work is a channel of
// some whole samples, or a part of one sample; the partition depends on the shape alone. The gradients of the
// parameters are summed by lane in the arithmetic's dtype over kBlock elements, then in fp64 in a fixed order.
// Takes y fp32 or bf16 with weights and medians fp32, or all fp64 (by libm, a value at a time).
#include "common/factorized.h"

#include "cpu/noise.h"
#include "cpu/parallel.h"
#include "cpu/vector_math.h"

namespace lic_fast {
namespace {

namespace density = factorized;

constexpr int64_t kGroup = 16;   // lanes that the sums know, whatever the vectors hold
constexpr int64_t kBlock = 256;  // elements that are gathered at a time; a multiple of kGroup
constexpr int64_t kItem = 4096;  // elements of an item of work at the most
constexpr int64_t kSerial = 2048;
constexpr int64_t kRow = 64;                         // room for the parameters of a channel, in whole vectors
constexpr int64_t kSums = density::kParameters + 1;  // and the median
constexpr int64_t kMedian = density::kParameters;

template <class Isa, class T>
struct Arithmetic : ScalarMath {
  using Base = ScalarMath;
  static LIC_FAST_INLINE double exp_within(double x) { return std::exp(x); }
  static LIC_FAST_INLINE double expm1_within(double x) { return std::expm1(x); }
};
template <class Isa>
struct Arithmetic<Isa, float> : VectorMath<Isa> {  // within: of numbers in [-80, 80]
  using Base = VectorMath<Isa>;
  using typename Base::Bits;
  using typename Base::Value;
  static LIC_FAST_INLINE Value exp_within(Value x) {
    Bits power;
    const Value part = Base::reduced_expm1(x, power) + 1.0f;
    return Value(Bits(part) + power);
  }
  static LIC_FAST_INLINE Value expm1_within(Value x) {
    Bits power;
    const Value part = Base::reduced_expm1(x, power);
    const Value scale = Value(Bits(Base::all(1.0f)) + power);
    return part * scale + (scale - 1.0f);
  }
};

struct Job {
  const void* y;
  const void* weights;
  const void* medians;     // null where there are none
  const void* grad_y_hat;  // null where there is none; one element for all where grad_y_hat_one
  const void* grad_rate;
  void* y_hat;  // null where nothing is quantised
  void* rate;
  void* grad_y;  // null where not wanted
  void* grad_weights;
  void* grad_medians;
  int64_t samples, channels, inner, stride;  // y's elements from a sample to the next
  int64_t seed;
  double likelihood_bound;
  int32_t type, mode, output;
  bool grad_y_hat_one, grad_rate_one;
  // the partition
  int64_t parts, samples_an_item, items;  // parts of a sample; items of a channel
  std::vector<double>* sums;              // backward: [channels, items, kSums]
  std::vector<double>* rate_sums;         // bits by channel: [samples, channels, parts]

  int64_t size() const { return samples * inner; }  // of a channel
  bool wants_sums() const { return grad_weights || grad_medians; }
};

// Elements [begin, begin + n) of a channel, counted over all samples, as stretches that lie together.
struct Stretch {
  int64_t sample, inside, at, n;
};
LIC_FAST_INLINE Stretch first_stretch(const Job& job, int64_t begin, int64_t n) {
  const int64_t sample = begin / job.inner, inside = begin - sample * job.inner;
  return {sample, inside, 0, std::min(job.inner - inside, n)};
}
LIC_FAST_INLINE void next_stretch(const Job& job, Stretch& s, int64_t n) {
  s.at += s.n;
  ++s.sample;
  s.inside = 0;
  s.n = std::min(job.inner, n - s.at);
}

template <class T, class From>
LIC_FAST_INLINE void gather(const Job& job, const From* from, int64_t stride, int64_t c, int64_t begin, int64_t n,
                            T* __restrict__ to) {
  for (Stretch s = first_stretch(job, begin, n); s.at < n; next_stretch(job, s, n)) {
    const From* row = from + s.sample * stride + c * job.inner + s.inside;
    for (int64_t i = 0; i < s.n; ++i) to[s.at + i] = convert<T>(row[i]);
  }
}

template <class T, class To>
LIC_FAST_INLINE void scatter(const Job& job, const T* from, int64_t c, int64_t begin, int64_t n, To* to) {
  for (Stretch s = first_stretch(job, begin, n); s.at < n; next_stretch(job, s, n)) {
    To* __restrict__ row = to + (s.sample * job.channels + c) * job.inner + s.inside;
    for (int64_t i = 0; i < s.n; ++i) row[i] = convert<To>(from[s.at + i]);
  }
}

template <class T>
LIC_FAST_INLINE double sum_of(const T* x, int64_t n) {
  constexpr int64_t kLanes = 8;
  double lanes[kLanes] = {}, sum = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += static_cast<double>(x[i + l]);
  }
  for (int64_t l = 0; l < kLanes; ++l) sum += lanes[l];
  for (; i < n; ++i) sum += static_cast<double>(x[i]);
  return sum;
}

// What the parameters of a channel become: softplus of matrices, tanh of factors; and the derivatives of that.
template <class M, class T>
LIC_FAST_INLINE void transform(const T* raw, T* w, T* slopes) {
  alignas(64) T x[kRow] = {}, soft[kRow], bent[kRow];
  std::memcpy(x, raw, density::kParameters * sizeof(T));
  for (int64_t i = 0; i < kRow; i += M::kLanes) {
    const auto v = M::load(x + i);
    M::store(soft + i, slopes ? density::softplus_slope<M, T>(v) : density::softplus<M, T>(v));
    M::store(bent + i, slopes ? density::tangent_slope<M, T>(v) : density::hyperbolic_tangent<M, T>(v));
  }
  for (int32_t i = 0; i < density::kParameters; ++i) {
    const density::Kind kind = density::kind(i);
    const T same = slopes ? T(1) : x[i];
    (slopes ? slopes : w)[i] = kind == density::kBias ? same : kind == density::kMatrix ? soft[i] : bent[i];
  }
}

template <class T>
struct Buffers {
  alignas(64) T value[kBlock];
  alignas(64) T rate[kBlock];      // forward: the result; backward: its gradient
  alignas(64) T gradient[kBlock];  // backward: that of y_hat, then that of y
};

// The quantised values of a block, followed by copies of the last one up to a whole group.
template <class M, class Y, class T>
LIC_FAST_INLINE void read_values(const Job& job, int64_t c, int64_t begin, int64_t n, T* value) {
  gather(job, static_cast<const Y*>(job.y), job.stride, c, begin, n, value);
  alignas(64) T noise[kBlock];
  if (job.mode == kNoise) {
    for (Stretch s = first_stretch(job, begin, n); s.at < n; next_stretch(job, s, n)) {
      noise_stretch<typename M::Base>(job.seed, (s.sample * job.channels + c) * job.inner + s.inside, s.n,
                                      noise + s.at);
    }
  }
  const bool centred = job.medians != nullptr;
  const T centre = centred ? static_cast<const T*>(job.medians)[c] : T(0);
  const int64_t whole = (n + kGroup - 1) / kGroup * kGroup;
  for (int64_t i = n; i < whole; ++i) {
    value[i] = value[n - 1];
    noise[i] = noise[n - 1];
  }
  if (job.mode == kNotQuantized) return;
  for (int64_t i = 0; i < whole; i += M::kLanes) {
    const auto u = job.mode == kNoise ? M::load(noise + i) : M::all(0);
    M::store(value + i, quantized<T>(M::load(value + i), M::all(centre), u, job.mode, centred));
  }
}

template <class M, class Y, class T>
LIC_FAST_INLINE void forward(const Job& job, int64_t c, int64_t begin, int64_t end) {
  alignas(64) T w[kRow];
  transform<M, T>(static_cast<const T*>(job.weights) + c * density::kParameters, w, nullptr);
  const RateRule<T> rule(job.likelihood_bound, job.output);
  Buffers<T> buffers;
  for (int64_t n; begin < end; begin += n) {
    n = std::min(kBlock, end - begin);
    read_values<M, Y>(job, c, begin, n, buffers.value);
    for (int64_t i = 0; i < n; i += M::kLanes) {
      density::Trail<typename M::Value> trail;
      const auto logits = density::walk<M, T>(w, M::load(buffers.value + i), trail);
      const auto log_p = density::log_likelihood<M, T>(logits).value;
      M::store(buffers.rate + i, rule.template rate<M>(log_p));
    }
    if (job.y_hat) scatter(job, buffers.value, c, begin, n, static_cast<Y*>(job.y_hat));
    if (job.output != kBitsPerChannel) {
      scatter(job, buffers.rate, c, begin, n, static_cast<T*>(job.rate));
      continue;
    }
    for (Stretch s = first_stretch(job, begin, n); s.at < n; next_stretch(job, s, n)) {
      const int64_t part = job.parts == 1 ? 0 : (begin % job.inner) / kItem;
      double& sum = (*job.rate_sums)[(s.sample * job.channels + c) * job.parts + part];
      sum += sum_of(buffers.rate + s.at, s.n);
    }
  }
}

template <class Y, class T>
LIC_FAST_INLINE void read_gradients(const Job& job, int64_t c, int64_t begin, int64_t n, Buffers<T>& buffers) {
  const T* rate = static_cast<const T*>(job.grad_rate);
  const Y* y_hat = job.mode == kNotQuantized ? nullptr : static_cast<const Y*>(job.grad_y_hat);
  for (int64_t i = 0; i < kBlock; ++i) {
    buffers.rate[i] = rate && job.grad_rate_one ? rate[0] : T(0);
    buffers.gradient[i] = y_hat && job.grad_y_hat_one ? convert<T>(y_hat[0]) : T(0);
  }
  for (int64_t i = n; i < kBlock; ++i) buffers.rate[i] = buffers.gradient[i] = T(0);
  const int64_t stride = job.channels * job.inner;
  if (y_hat && !job.grad_y_hat_one) gather(job, y_hat, stride, c, begin, n, buffers.gradient);
  if (!rate || job.grad_rate_one) return;
  if (job.output != kBitsPerChannel) return gather(job, rate, stride, c, begin, n, buffers.rate);
  for (Stretch s = first_stretch(job, begin, n); s.at < n; next_stretch(job, s, n)) {
    for (int64_t i = 0; i < s.n; ++i) buffers.rate[s.at + i] = rate[s.sample * job.channels + c];
  }
}

// Adds the gradient of the density to buffers.gradient, those of the parameters to `sums` [kParameters] by lane.
template <class M, class T>
LIC_FAST_INLINE void backward_block(const RateRule<T>& rule, const T* w, int64_t n, Buffers<T>& buffers,
                                    double (*sums)[kGroup]) {
  using V = typename M::Value;
  constexpr int64_t kVectors = kGroup / M::kLanes;
  V by_lane[kVectors][density::kParameters] = {};
  for (int64_t i = 0; i < n; i += kGroup) {
    for (int64_t v = 0; v < kVectors; ++v) {
      const int64_t at = i + v * M::kLanes;
      density::Trail<V> trail;
      const auto logits = density::walk<M, T>(w, M::load(buffers.value + at), trail);
      const auto likelihood = density::log_likelihood<M, T>(logits);
      const V g = rule.template upstream<M>(M::load(buffers.rate + at), likelihood.value);
      const V by_y = density::walk_back(w, trail, g * likelihood.by_low, g * likelihood.by_gap, by_lane[v]);
      M::store(buffers.gradient + at, M::load(buffers.gradient + at) + by_y);
    }
  }
  for (int32_t p = 0; p < density::kParameters; ++p) {
    alignas(64) T lanes[kGroup];
    for (int64_t v = 0; v < kVectors; ++v) M::store(lanes + v * M::kLanes, by_lane[v][p]);
    for (int64_t l = 0; l < kGroup; ++l) sums[p][l] += static_cast<double>(lanes[l]);
  }
}

template <class M, class Y, class T>
LIC_FAST_INLINE void backward(const Job& job, int64_t c, int64_t begin, int64_t end, double* result) {
  alignas(64) T w[kRow];
  transform<M, T>(static_cast<const T*>(job.weights) + c * density::kParameters, w, nullptr);
  const RateRule<T> rule(job.likelihood_bound, job.output);
  Buffers<T> buffers;
  alignas(64) double by_lane[density::kParameters][kGroup] = {};
  double median = 0;
  for (int64_t n; begin < end; begin += n) {
    n = std::min(kBlock, end - begin);
    read_values<M, Y>(job, c, begin, n, buffers.value);
    read_gradients<Y>(job, c, begin, n, buffers);
    if (job.grad_rate) backward_block<M, T>(rule, w, n, buffers, by_lane);
    if (job.mode == kDequantize) {
      median += sum_of(buffers.gradient, n);
      for (int64_t i = 0; i < n; ++i) buffers.gradient[i] = T(0);
    }
    if (job.grad_y) scatter(job, buffers.gradient, c, begin, n, static_cast<Y*>(job.grad_y));
  }
  if (!result) return;
  for (int32_t p = 0; p < density::kParameters; ++p) result[p] = sum_of(by_lane[p], kGroup);
  result[kMedian] = median;
}

// The gradients of a channel's parameters from the sums of its items.
template <class M, class T>
LIC_FAST_INLINE void finish(const Job& job, int64_t c) {
  double total[kSums] = {};
  for (int64_t item = 0; item < job.items; ++item) {
    const double* sums = job.sums->data() + (c * job.items + item) * kSums;
    for (int64_t p = 0; p < kSums; ++p) total[p] += sums[p];
  }
  if (job.grad_medians) static_cast<T*>(job.grad_medians)[c] = static_cast<T>(total[kMedian]);
  if (!job.grad_weights) return;
  alignas(64) T slopes[kRow];
  transform<M, T>(static_cast<const T*>(job.weights) + c * density::kParameters, nullptr, slopes);
  T* row = static_cast<T*>(job.grad_weights) + c * density::kParameters;
  for (int32_t p = 0; p < density::kParameters; ++p) row[p] = static_cast<T>(total[p] * slopes[p]);
}

enum Step : int32_t { kForward, kBackward, kFinish };

template <class Isa, class Y, class T>
LIC_FAST_INLINE void run_typed(const Job& job, Step step, int64_t c, int64_t item) {
  using M = Arithmetic<Isa, T>;
  if (step == kFinish) return finish<M, T>(job, c);
  const int64_t sample = job.parts == 1 ? item * job.samples_an_item : item / job.parts;
  const int64_t part = job.parts == 1 ? 0 : item % job.parts;
  const int64_t begin = sample * job.inner + part * kItem;
  const int64_t end = job.parts == 1 ? std::min(job.size(), begin + job.samples_an_item * job.inner)
                                     : std::min(begin + kItem, (sample + 1) * job.inner);
  if (step == kForward) return forward<M, Y, T>(job, c, begin, end);
  double* sums = job.wants_sums() ? job.sums->data() + (c * job.items + item) * kSums : nullptr;
  backward<M, Y, T>(job, c, begin, end, sums);
}

template <class Isa>
LIC_FAST_INLINE void run_body(const Job& job, Step step, int64_t c, int64_t item) {
  switch (job.type) {
    case kFloat32: return run_typed<Isa, float, float>(job, step, c, item);
    case kBFloat16: return run_typed<Isa, BFloat16, float>(job, step, c, item);
    default: return run_typed<Isa, double, double>(job, step, c, item);
  }
}

LIC_FAST_SIMD_VARIANTS(run, (const Job& job, Step step, int64_t c, int64_t item), (job, step, c, item));

const void* data_or_null(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
void* wanted(const Tensor& tensor) { return tensor.numel() ? tensor.mutable_data_ptr() : nullptr; }

Job make_job(const Tensor& y, const Tensor& weights, const std::optional<Tensor>& medians,
             const std::optional<Tensor>& seed, int64_t mode, double likelihood_bound, int64_t output) {
  Job job{};
  job.type = dtype_code(y);
  STD_TORCH_CHECK(job.type == kFloat32 || job.type == kBFloat16 || job.type == kFloat64,
                  "factorized_rate: a dtype that the C++ kernel does not read");
  STD_TORCH_CHECK(mode != kNoise || seed, "factorized_rate: noise needs a seed");
  job.samples = y.size(0);
  job.channels = y.size(1);
  job.inner = y.numel() / (job.samples * job.channels);
  STD_TORCH_CHECK(weights.numel() == job.channels * density::kParameters, "factorized_rate: weights of another size");
  job.stride = job.samples > 1 ? y.stride(0) : 0;
  job.y = y.const_data_ptr();
  job.weights = weights.const_data_ptr();
  job.medians = data_or_null(medians);
  job.seed = seed ? *static_cast<const int64_t*>(seed->const_data_ptr()) : 0;
  job.likelihood_bound = likelihood_bound;
  job.mode = static_cast<int32_t>(mode);
  job.output = static_cast<int32_t>(output);
  job.parts = (job.inner + kItem - 1) / kItem;
  job.samples_an_item = std::max<int64_t>(1, kItem / job.inner);
  job.items = job.parts > 1 ? job.samples * job.parts : (job.samples + job.samples_an_item - 1) / job.samples_an_item;
  return job;
}

void run_items(const Job& job, Step step) {
  const int64_t grain = std::max<int64_t>(1, kSerial / (job.size() / job.items + 1));
  torch::stable::parallel_for(0, job.channels * job.items, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(job, step, i / job.items, i % job.items);
  });
}

void factorized_rate_out(Tensor y, Tensor weights, std::optional<Tensor> medians, std::optional<Tensor> seed,
                         int64_t quantize, double likelihood_bound, int64_t output, Tensor y_hat, Tensor rate) {
  Job job = make_job(y, weights, medians, seed, quantize, likelihood_bound, output);
  job.y_hat = wanted(y_hat);
  job.rate = rate.mutable_data_ptr();
  std::vector<double> sums(output == kBitsPerChannel ? job.samples * job.channels * job.parts : 0);
  job.rate_sums = &sums;
  run_items(job, kForward);
  if (output != kBitsPerChannel) return;
  for (int64_t i = 0; i < job.samples * job.channels; ++i) {
    double sum = 0;
    for (int64_t part = 0; part < job.parts; ++part) sum += sums[i * job.parts + part];
    if (job.type == kFloat64) {
      static_cast<double*>(job.rate)[i] = sum;
    } else {
      static_cast<float*>(job.rate)[i] = static_cast<float>(sum);
    }
  }
}

// grad_y, grad_weights and grad_medians are written where they have elements.
void factorized_rate_bwd_out(std::optional<Tensor> grad_y_hat, std::optional<Tensor> grad_rate, Tensor y,
                             Tensor weights, std::optional<Tensor> medians, std::optional<Tensor> seed,
                             int64_t quantize, double likelihood_bound, int64_t output, Tensor grad_y,
                             Tensor grad_weights, Tensor grad_medians) {
  Job job = make_job(y, weights, medians, seed, quantize, likelihood_bound, output);
  job.grad_y_hat = data_or_null(grad_y_hat);
  job.grad_rate = data_or_null(grad_rate);
  job.grad_y_hat_one = grad_y_hat && grad_y_hat->numel() == 1;
  job.grad_rate_one = grad_rate && grad_rate->numel() == 1;
  job.grad_y = wanted(grad_y);
  job.grad_weights = wanted(grad_weights);
  job.grad_medians = wanted(grad_medians);
  std::vector<double> sums(job.wants_sums() ? job.channels * job.items * kSums : 0);
  job.sums = &sums;
  run_items(job, kBackward);
  if (!job.wants_sums()) return;
  torch::stable::parallel_for(0, job.channels, kSerial / kRow, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) run(job, kFinish, c, 0);
  });
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cpp, m) { lic_fast::factorized::define(m); }

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("factorized_rate_out", TORCH_BOX(&lic_fast::factorized_rate_out));
  m.impl("factorized_rate_bwd_out", TORCH_BOX(&lic_fast::factorized_rate_bwd_out));
}
