// Rate of a latent under CompressAI's EntropyBottleneck, and its gradients; common/factorized.h has the density.
//
// Compute-bound: 12 units of two exponentials and a division an element each way, against 8 to 24 bytes of traffic. A
// block takes an item of work: a channel of some whole samples, or a part of one sample, kItem elements at the most;
// the partition depends on the shape alone. It transforms the channel's parameters once, into shared memory, where all
// threads read the same word at a time. A thread takes four neighbours at a time, in one access where rows allow it,
// and runs the network for one after the other: the network and its trail stay in registers.
//
// The gradients of the 58 parameters are summed by thread in registers, over at most kItem / kThreads elements, then
// over a warp by halves (62 shuffles, not 5 for each sum), and over warps and items in fp64, always in the same order.
// A channel of one item is finished by its block; else a second launch adds the items.
// Takes y fp32, bf16 or fp16 with weights and medians fp32, or all fp64.
#include "cuda/factorized_rate.cuh"

namespace lic_fast {
namespace {

template <class Y, class T>
__global__ void __launch_bounds__(kThreads) factorized_rate_fwd_kernel(const __grid_constant__ Job<Y, T> job) {
  __shared__ T w[density::kParameters];
  __shared__ T bits[kItem];
  const Item item = item_of(job);
  transform(job.weights + item.c * density::kParameters, w);
  const bool reduced = job.rule.output == kBitsPerChannel;
  for (int32_t first = 4 * static_cast<int32_t>(threadIdx.x); first < item.n; first += 4 * kThreads) {
    const Quad q = quad_of(job, item, first);
    T value[4];
    read_values(job, item, q, value);
    Four<Y> y_hat;
    Four<T> rate;
#pragma unroll
    for (int32_t j = 0; j < 4; ++j) {
      density::Trail<T> trail;  // unused here, so that none of it is kept
      const density::Logits<T> logits = density::walk<DeviceMath, T>(w, value[j], trail);
      rate.at[j] = job.rule.template rate<DeviceMath>(density::log_likelihood<DeviceMath, T>(logits).value);
      y_hat.at[j] = convert<Y>(value[j]);
      if (reduced && first + j < item.n) bits[first + j] = rate.at[j];
    }
    if (job.y_hat) scatter(job.y_hat, q, job.vector, y_hat);
    if (!reduced) scatter(job.rate, q, job.vector, rate);
  }
  if (!reduced) return;
  __syncthreads();
  add_rows(job, item, bits);
}

template <class T>
__global__ void factorized_rate_parts_kernel(const double* sums, int64_t rows, int64_t parts, T* rate) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  double sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += sums[row * parts + part];
  rate[row] = static_cast<T>(sum);
}

template <class Y, class T>
__device__ __forceinline__ void finish(const Job<Y, T>& job, int64_t c, int32_t p, double total) {
  if (p == kMedian && job.grad_medians) job.grad_medians[c] = static_cast<T>(total);
  if (p >= density::kParameters || !job.grad_weights) return;
  const density::Kind kind = density::kind(p);
  const T raw = job.weights[c * density::kParameters + p];
  T slope = T(1);
  if (kind == density::kMatrix) slope = density::softplus_slope<DeviceMath, T>(raw);
  if (kind == density::kFactor) slope = density::tangent_slope<DeviceMath, T>(raw);
  job.grad_weights[c * density::kParameters + p] = static_cast<T>(total * static_cast<double>(slope));
}

template <class Y, class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    factorized_rate_bwd_kernel(const __grid_constant__ Job<Y, T> job) {
  __shared__ T w[density::kParameters];
  __shared__ T by_warp[kWarps][kRow];
  const Item item = item_of(job);
  transform(job.weights + item.c * density::kParameters, w);
  T sums[kRow] = {};
  const bool through = job.grad_y_hat && job.mode != kNotQuantized;
  for (int32_t first = 4 * static_cast<int32_t>(threadIdx.x); first < item.n; first += 4 * kThreads) {
    const Quad q = quad_of(job, item, first);
    T value[4];
    read_values(job, item, q, value);
    Four<T> up{};
    Four<Y> passed{};
    const bool whole = job.grad_rate && !job.grad_rate_one && job.rule.output != kBitsPerChannel;
    if (whole) up = gather(job.grad_rate, q.at, q, job.vector);
    if (through && !job.grad_y_hat_one) passed = gather(job.grad_y_hat, q.at, q, job.vector);
    Four<Y> grad_y;
#pragma unroll 1  // the network and its way back fill the instruction cache once
    for (int32_t j = 0; j < 4; ++j) {
      const bool here = first + j < item.n;
      T g = pick(up.at, j), total = T(0);
      if (job.grad_rate && !whole && here) g = job.grad_rate[job.grad_rate_one ? 0 : pick(q.row, j)];
      if (through) total = convert<T>(job.grad_y_hat_one ? job.grad_y_hat[0] : pick(passed.at, j));
      if (job.grad_rate && here) {
        density::Trail<T> trail;
        const density::Logits<T> logits = density::walk<DeviceMath, T>(w, pick(value, j), trail);
        const density::LogLikelihood<T> likelihood = density::log_likelihood<DeviceMath, T>(logits);
        g = job.rule.template upstream<DeviceMath>(g, likelihood.value);
        total += density::walk_back(w, trail, g * likelihood.by_low, g * likelihood.by_gap, sums);
      }
      if (job.mode == kDequantize) {
        if (here) sums[kMedian] += total;
        total = T(0);
      }
#pragma unroll
      for (int32_t k = 0; k < 4; ++k) {
        if (k == j) grad_y.at[k] = convert<Y>(total);
      }
    }
    if (job.grad_y) scatter(job.grad_y, q, job.vector, grad_y);
  }
  if (!job.sums) return;
  add_halves(sums);
  const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32, lane = static_cast<int32_t>(threadIdx.x) % 32;
  by_warp[warp][2 * lane] = sums[0];
  by_warp[warp][2 * lane + 1] = sums[1];
  __syncthreads();
  const int32_t p = static_cast<int32_t>(threadIdx.x);
  if (p >= kRow) return;
  double total = 0;
  for (int32_t i = 0; i < kWarps; ++i) total += static_cast<double>(by_warp[i][p]);
  if (job.items == 1) return finish(job, item.c, p, total);
  job.sums[int64_t{blockIdx.x} * kRow + p] = total;
}

template <class Y, class T>
__global__ void __launch_bounds__(kRow) factorized_rate_items_kernel(const __grid_constant__ Job<Y, T> job) {
  const int32_t p = static_cast<int32_t>(threadIdx.x);
  const int64_t c = blockIdx.x;
  double total = 0;
  for (int64_t item = 0; item < job.items; ++item) total += job.sums[(c * job.items + item) * kRow + p];
  finish(job, c, p, total);
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}
template <class T>
T* wanted(const Tensor& tensor) {
  return tensor.numel() ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

struct Arguments {
  const Tensor &y, &weights;
  const std::optional<Tensor>&medians, &seed;
  int64_t mode, output;
  double likelihood_bound;
};

template <class Y, class T>
Job<Y, T> make_job(const Arguments& a) {
  Job<Y, T> job{.rule = RateRule<T>(a.likelihood_bound, static_cast<int32_t>(a.output))};
  STD_TORCH_CHECK(a.y.dim() >= 2 && a.y.numel() > 0, "factorized_rate: y must be [B, C, *] and not empty");
  job.y = static_cast<const Y*>(a.y.const_data_ptr());
  job.weights = static_cast<const T*>(a.weights.const_data_ptr());
  job.medians = data_or_null<T>(a.medians);
  job.seed = data_or_null<int64_t>(a.seed);
  job.samples = a.y.size(0);
  job.channels = a.y.size(1);
  job.inner = a.y.numel() / (job.samples * job.channels);
  job.stride = job.samples > 1 ? a.y.stride(0) : 0;
  job.parts = (job.inner + kItem - 1) / kItem;
  job.samples_an_item = std::max<int64_t>(1, kItem / job.inner);
  job.items = job.parts > 1 ? job.samples * job.parts : (job.samples + job.samples_an_item - 1) / job.samples_an_item;
  job.mode = static_cast<int32_t>(a.mode);
  job.vector = job.inner % 4 == 0 && job.stride % 4 == 0 && aligned4(job.y, sizeof(Y));
  STD_TORCH_CHECK(job.mode != kNoise || job.seed, "factorized_rate: noise needs a seed");
  STD_TORCH_CHECK(a.weights.numel() == job.channels * density::kParameters, "factorized_rate: weights of another size");
  STD_TORCH_CHECK(job.channels * job.items <= INT32_MAX, "factorized_rate: more elements than one launch takes");
  return job;
}

template <class Y, class T>
void forward(const Arguments& a, const Tensor& y_hat, const Tensor& rate, cudaStream_t stream) {
  Job<Y, T> job = make_job<Y, T>(a);
  job.y_hat = wanted<Y>(y_hat);
  job.rate = static_cast<T*>(rate.mutable_data_ptr());
  const bool reduced = a.output == kBitsPerChannel;
  job.vector = job.vector && aligned4(job.y_hat, sizeof(Y)) && (reduced || aligned4(job.rate, sizeof(T)));
  std::optional<Tensor> room;
  if (reduced && job.parts > 1) {
    room = torch::stable::new_empty(a.y, {job.samples * job.channels * job.parts}, ScalarType::Double);
    job.sums = static_cast<double*>(room->mutable_data_ptr());
  }
  factorized_rate_fwd_kernel<Y, T><<<static_cast<uint32_t>(job.channels * job.items), kThreads, 0, stream>>>(job);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (!job.sums) return;
  const int64_t rows = job.samples * job.channels;
  factorized_rate_parts_kernel<T><<<static_cast<uint32_t>((rows + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
      job.sums, rows, job.parts, job.rate);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

struct Gradients {
  const std::optional<Tensor>&of_y_hat, &of_rate;
  const Tensor &y, &weights, &medians;
};

template <class Y, class T>
void backward(const Arguments& a, const Gradients& g, cudaStream_t stream) {
  Job<Y, T> job = make_job<Y, T>(a);
  job.grad_y_hat = data_or_null<Y>(g.of_y_hat);
  job.grad_rate = data_or_null<T>(g.of_rate);
  job.grad_y_hat_one = g.of_y_hat && g.of_y_hat->numel() == 1;
  job.grad_rate_one = g.of_rate && g.of_rate->numel() == 1;
  job.grad_y = wanted<Y>(g.y);
  job.grad_weights = wanted<T>(g.weights);
  job.grad_medians = wanted<T>(g.medians);
  job.vector = job.vector && aligned4(job.grad_y, sizeof(Y));
  job.vector = job.vector && (job.grad_y_hat_one || aligned4(job.grad_y_hat, sizeof(Y)));
  job.vector = job.vector && (job.grad_rate_one || a.output == kBitsPerChannel || aligned4(job.grad_rate, sizeof(T)));
  const Tensor room = torch::stable::new_empty(
      a.y, {job.grad_weights || job.grad_medians ? job.channels * job.items * kRow : 0}, ScalarType::Double);
  job.sums = wanted<double>(room);
  factorized_rate_bwd_kernel<Y, T><<<static_cast<uint32_t>(job.channels * job.items), kThreads, 0, stream>>>(job);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (!job.sums || job.items == 1) return;
  factorized_rate_items_kernel<Y, T><<<static_cast<uint32_t>(job.channels), kRow, 0, stream>>>(job);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void factorized_rate_out(Tensor y, Tensor weights, std::optional<Tensor> medians, std::optional<Tensor> seed,
                         int64_t quantize, double likelihood_bound, int64_t output, Tensor y_hat, Tensor rate) {
  const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  const cudaStream_t stream = current_stream(y);
  const Arguments a{y, weights, medians, seed, quantize, output, likelihood_bound};
  switch (dtype_code(y)) {
    case kFloat32: return forward<float, float>(a, y_hat, rate, stream);
    case kBFloat16: return forward<__nv_bfloat16, float>(a, y_hat, rate, stream);
    case kFloat16: return forward<__half, float>(a, y_hat, rate, stream);
    case kFloat64: return forward<double, double>(a, y_hat, rate, stream);
    default: STD_TORCH_CHECK(false, "factorized_rate: a dtype that the CUDA kernel does not read");
  }
}

// grad_y, grad_weights and grad_medians are written where they have elements.
void factorized_rate_bwd_out(std::optional<Tensor> grad_y_hat, std::optional<Tensor> grad_rate, Tensor y,
                             Tensor weights, std::optional<Tensor> medians, std::optional<Tensor> seed,
                             int64_t quantize, double likelihood_bound, int64_t output, Tensor grad_y,
                             Tensor grad_weights, Tensor grad_medians) {
  const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  const cudaStream_t stream = current_stream(y);
  const Arguments a{y, weights, medians, seed, quantize, output, likelihood_bound};
  const Gradients g{grad_y_hat, grad_rate, grad_y, grad_weights, grad_medians};
  switch (dtype_code(y)) {
    case kFloat32: return backward<float, float>(a, g, stream);
    case kBFloat16: return backward<__nv_bfloat16, float>(a, g, stream);
    case kFloat16: return backward<__half, float>(a, g, stream);
    case kFloat64: return backward<double, double>(a, g, stream);
    default: STD_TORCH_CHECK(false, "factorized_rate: a dtype that the CUDA kernel does not read");
  }
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cuda, m) { lic_fast::factorized::define(m); }

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("factorized_rate_out", TORCH_BOX(&lic_fast::factorized_rate_out));
  m.impl("factorized_rate_bwd_out", TORCH_BOX(&lic_fast::factorized_rate_bwd_out));
}
