// The noising of diffusion training, its weighted loss and the gradient; lic_fast/reference/q_sample.py says what each
// element gets:
//     noisy = signal x + spread n;   loss = mean of weight e^2, or weight |e|,  e = f - target;   d_f = scale e
// A launch each, and a small one that adds the loss's parts. A block takes a part of one sample, so that its numbers
// are uniform; a thread takes four neighbours, one block of Philox: n, and a target that is n, exist in registers only.
// The loss is added by thread and over a warp in the arithmetic's dtype, over warps and parts in fp64, always in the
// same order. Takes tensors [B, *] dense, one sample after the other and in one order (row-major where there is noise),
// in fp32, bf16, fp16 or fp64. Arithmetic is unfused, in fp32, or in fp64 for fp64.
#include <optional>

#include "common/normal.h"
#include "cuda/device.cuh"

namespace lic_fast {
namespace {

constexpr int32_t kThreads = 256;
constexpr int32_t kWarps = kThreads / 32;
constexpr int32_t kSumVectors = 4;  // of a thread, where a block's elements become one number

__host__ __device__ constexpr int64_t part_elements(int32_t vectors) { return int64_t{4} * kThreads * vectors; }

struct Arguments {
  const void* f;  // x of the noising
  const void* x;  // the target, or null: the noise
  void* out;
  const void* a;  // [B]: signal, or the gradient's scale
  const void* b;  // [B]: spread
  const int64_t* seed;
  double* sums;        // [B * parts] of the loss
  int64_t samples, n;  // elements of a sample
  int32_t parts;       // of a sample
  bool absolute, vector;
};

struct Place {
  int64_t sample, base, first;  // base: of the sample's elements; first: of the block's, in the sample
};

__device__ __forceinline__ Place place_of(const Arguments& p, int32_t vectors) {
  const uint32_t sample = blockIdx.x / static_cast<uint32_t>(p.parts), part = blockIdx.x - sample * p.parts;
  return {sample, sample * p.n, part * part_elements(vectors)};
}

// Standard normal noise of four neighbours; i counts all elements.
__device__ __forceinline__ void normal4(int64_t seed, int64_t i, float (&normal)[4]) {
  uniform4(seed, i, normal);
#pragma unroll
  for (int32_t j = 0; j < 4; ++j) normal[j] = normal_of(normal[j]);
}

template <class T, class Acc>
__global__ void __launch_bounds__(kThreads) q_sample_kernel(const __grid_constant__ Arguments p) {
  const Place at = place_of(p, 1);
  const int64_t i = at.first + int64_t{threadIdx.x} * 4;
  if (i >= p.n) return;
  const Acc signal = static_cast<const Acc*>(p.a)[at.sample], spread = static_cast<const Acc*>(p.b)[at.sample];
  Four<T> x = load4(static_cast<const T*>(p.f) + at.base, i, p.n, p.vector);
  float normal[4];
  normal4(*p.seed, at.base + i, normal);
#pragma unroll
  for (int32_t j = 0; j < 4; ++j) {
    x.at[j] = convert<T>(add(multiply(convert<Acc>(x.at[j]), signal), multiply(static_cast<Acc>(normal[j]), spread)));
  }
  store4(static_cast<T*>(p.out) + at.base, i, p.n, p.vector, x);
}

// f less its target, for four neighbours from element i of a sample on.
template <class T, class Acc>
__device__ __forceinline__ void errors4(const Arguments& p, const Place& at, int64_t i, const Four<T>& f,
                                        const Four<T>& x, Acc (&error)[4]) {
  float normal[4];
  if (!p.x) normal4(*p.seed, at.base + i, normal);
#pragma unroll
  for (int32_t j = 0; j < 4; ++j) {
    const Acc target = p.x ? convert<Acc>(x.at[j]) : static_cast<Acc>(normal[j]);
    error[j] = add(convert<Acc>(f.at[j]), -target);
  }
}

template <class T>
__device__ __forceinline__ Four<T> target4(const Arguments& p, const Place& at, int64_t i) {
  return p.x ? load4(static_cast<const T*>(p.x) + at.base, i, p.n, p.vector) : Four<T>{};
}

template <class T, class Acc>
__global__ void __launch_bounds__(kThreads) q_sample_loss_kernel(const __grid_constant__ Arguments p) {
  __shared__ Acc by_warp[kWarps];
  const Place at = place_of(p, kSumVectors);
  Four<T> f[kSumVectors], x[kSumVectors];
#pragma unroll
  for (int32_t v = 0; v < kSumVectors; ++v) {
    const int64_t i = at.first + (int64_t{v} * kThreads + threadIdx.x) * 4;
    f[v] = load4(static_cast<const T*>(p.f) + at.base, i, p.n, p.vector);
    x[v] = target4<T>(p, at, i);
  }
  Acc sum = Acc(0);
#pragma unroll
  for (int32_t v = 0; v < kSumVectors; ++v) {
    const int64_t i = at.first + (int64_t{v} * kThreads + threadIdx.x) * 4;
    Acc error[4];
    if (i < p.n) errors4<T, Acc>(p, at, i, f[v], x[v], error);
#pragma unroll
    for (int32_t j = 0; j < 4; ++j) {
      if (i + j < p.n) sum = add(sum, p.absolute ? fabs(error[j]) : multiply(error[j], error[j]));
    }
  }
  for (int32_t step = 16; step > 0; step >>= 1) sum = add(sum, __shfl_xor_sync(0xFFFFFFFFu, sum, step));
  if (threadIdx.x % 32 == 0) by_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0;
  for (int32_t w = 0; w < kWarps; ++w) total += static_cast<double>(by_warp[w]);
  p.sums[blockIdx.x] = total;
}

// The mean over all elements of the parts' sums times their samples' weights; one block.
template <class Acc>
__global__ void __launch_bounds__(kThreads) q_sample_loss_parts_kernel(const __grid_constant__ Arguments p) {
  __shared__ double by_thread[kThreads];
  const Acc* weight = static_cast<const Acc*>(p.a);
  const uint32_t count = static_cast<uint32_t>(p.samples) * p.parts;
  double sum = 0;
  for (uint32_t t = threadIdx.x; t < count; t += kThreads) sum += static_cast<double>(weight[t / p.parts]) * p.sums[t];
  by_thread[threadIdx.x] = sum;
  for (int32_t half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int32_t>(threadIdx.x) < half) by_thread[threadIdx.x] += by_thread[threadIdx.x + half];
  }
  if (threadIdx.x == 0) {
    const double elements = static_cast<double>(p.samples) * static_cast<double>(p.n);
    *static_cast<Acc*>(p.out) = static_cast<Acc>(by_thread[0] / elements);
  }
}

template <class T, class Acc>
__global__ void __launch_bounds__(kThreads) q_sample_loss_bwd_kernel(const __grid_constant__ Arguments p) {
  const Place at = place_of(p, 1);
  const int64_t i = at.first + int64_t{threadIdx.x} * 4;
  if (i >= p.n) return;
  const Acc scale = static_cast<const Acc*>(p.a)[at.sample];
  Four<T> f = load4(static_cast<const T*>(p.f) + at.base, i, p.n, p.vector);
  Acc error[4];
  errors4<T, Acc>(p, at, i, f, target4<T>(p, at, i), error);
#pragma unroll
  for (int32_t j = 0; j < 4; ++j) {
    const Acc e = error[j], below = e < Acc(0) ? Acc(-1) : e;  // NaN and 0 stay
    f.at[j] = convert<T>(multiply(p.absolute ? (e > Acc(0) ? Acc(1) : below) : e, scale));
  }
  store4(static_cast<T*>(p.out) + at.base, i, p.n, p.vector, f);
}

enum class Job { kNoising, kLoss, kGradient };

template <class T, class Acc>
void launch(Job job, Arguments p, const Tensor& like) {
  const int64_t part = part_elements(job == Job::kLoss ? kSumVectors : 1), parts = (p.n + part - 1) / part;
  STD_TORCH_CHECK(p.samples <= INT32_MAX / parts, "lic_fast: q_sample takes fewer elements, got ", p.samples * p.n);
  p.parts = static_cast<int32_t>(parts);
  p.vector = p.n % 4 == 0 && aligned4(p.f, sizeof(T)) && aligned4(p.x, sizeof(T)) &&
             (job == Job::kLoss || aligned4(p.out, sizeof(T)));
  const uint32_t blocks = static_cast<uint32_t>(p.samples * parts);
  const cudaStream_t stream = current_stream(like);
  std::optional<Tensor> room;
  if (job == Job::kNoising) {
    q_sample_kernel<T, Acc><<<blocks, kThreads, 0, stream>>>(p);
  } else if (job == Job::kGradient) {
    q_sample_loss_bwd_kernel<T, Acc><<<blocks, kThreads, 0, stream>>>(p);
  } else {
    room = torch::stable::new_empty(like, {p.samples * parts}, ScalarType::Double);
    p.sums = static_cast<double*>(room->mutable_data_ptr());
    q_sample_loss_kernel<T, Acc><<<blocks, kThreads, 0, stream>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    q_sample_loss_parts_kernel<Acc><<<1, kThreads, 0, stream>>>(p);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void check_column(const Tensor& values, const Tensor& f) {
  STD_TORCH_CHECK(values.is_contiguous() && values.numel() == f.size(0) &&
                      dtype_code(values) == (dtype_code(f) == kFloat64 ? kFloat64 : kFloat32),
                  "lic_fast: q_sample takes one number a sample, of the arithmetic's dtype");
}

// x and seed may be empty, spread is null but for the noising.
void run(Job job, const Tensor& f, const Tensor* x, const Tensor& a, const Tensor* b, const Tensor& seed, bool absolute,
         const Tensor& out) {
  const int32_t dtype = dtype_code(f);
  const bool noisy = seed.numel() != 0, targeted = x && x->numel() != 0;
  STD_TORCH_CHECK(f.dim() >= 1 && is_dense(f), "lic_fast: q_sample takes dense tensors [B, *]");
  STD_TORCH_CHECK(noisy ? f.is_contiguous() && !targeted : f.numel() == 0 || targeted,
                  "lic_fast: q_sample takes noise, counted in row-major order, or a target");
  for (const Tensor* t : {targeted ? x : nullptr, job == Job::kLoss ? nullptr : &out}) {
    STD_TORCH_CHECK(!t || (dtype_code(*t) == dtype && alike(f, *t)), "lic_fast: q_sample takes dense tensors alike");
  }
  check_column(a, f);
  if (b) check_column(*b, f);
  if (f.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(f.get_device_index());
  const Arguments p{f.const_data_ptr(),
                    targeted ? x->const_data_ptr() : nullptr,
                    out.mutable_data_ptr(),
                    a.const_data_ptr(),
                    b ? b->const_data_ptr() : nullptr,
                    noisy ? static_cast<const int64_t*>(seed.const_data_ptr()) : nullptr,
                    nullptr,
                    f.size(0),
                    f.numel() / f.size(0),
                    0,
                    absolute,
                    false};
  switch (dtype) {
    case kFloat32: return launch<float, float>(job, p, f);
    case kBFloat16: return launch<__nv_bfloat16, float>(job, p, f);
    case kFloat16: return launch<__half, float>(job, p, f);
    case kFloat64: return launch<double, double>(job, p, f);
    default: STD_TORCH_CHECK(false, "lic_fast: q_sample takes float32, bfloat16, float16 and float64");
  }
}

void q_sample_out(Tensor x, Tensor signal, Tensor spread, Tensor seed, Tensor out) {
  run(Job::kNoising, x, nullptr, signal, &spread, seed, false, out);
}

void q_sample_loss_out(Tensor f, Tensor x, Tensor weight, Tensor seed, bool absolute, Tensor loss) {
  run(Job::kLoss, f, &x, weight, nullptr, seed, absolute, loss);
}

void q_sample_loss_bwd_out(Tensor f, Tensor x, Tensor scale, Tensor seed, bool absolute, Tensor d_f) {
  run(Job::kGradient, f, &x, scale, nullptr, seed, absolute, d_f);
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cuda, m) {
  m.def("q_sample_out(Tensor x, Tensor signal, Tensor spread, Tensor seed, Tensor(a!) out) -> ()");
  m.def("q_sample_loss_out(Tensor f, Tensor x, Tensor weight, Tensor seed, bool absolute, Tensor(a!) loss) -> ()");
  m.def("q_sample_loss_bwd_out(Tensor f, Tensor x, Tensor scale, Tensor seed, bool absolute, Tensor(a!) d_f) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("q_sample_out", TORCH_BOX(&lic_fast::q_sample_out));
  m.impl("q_sample_loss_out", TORCH_BOX(&lic_fast::q_sample_loss_out));
  m.impl("q_sample_loss_bwd_out", TORCH_BOX(&lic_fast::q_sample_loss_bwd_out));
}
