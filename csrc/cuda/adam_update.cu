// Adam over a list of tensors, two launches (of each thousand or so tensors):
//     m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2
//     p <- (p - step_size m / (sqrt(v) + eps)) (1 - lr weight_decay)
// First a block a tensor reads the gradient, counts the step as taken, or as skipped where the gradient is not finite,
// and computes the step's scalars in fp64: counts and hyper stay on the device. Then blocks of kBlockElements read
// p, g, m, v and write p, m, v: 28 bytes an element in fp32, vectors of four where all four addresses allow. The list
// travels in the kernels' parameters (csrc/common/list.h). Meant for biases and other small tensors: the first launch
// reads a tensor with one block. Takes fp32, bf16 and fp16 parameters and gradients with fp32 averages, dense, the four
// laid out alike; not normalize_grads. Arithmetic is unfused.
#include "common/list.h"
#include "cuda/device.cuh"

namespace lic_fast {
namespace {

constexpr int32_t kThreads = 256;
constexpr int64_t kBlockElements = int64_t{4} * kThreads;

struct Entry {
  void* param;
  const void* grad;
  float* m;
  float* v;
  int64_t n;
  int32_t param_type;
  int32_t grad_type;
  int32_t vector;
  int32_t row;  // of counts, hyper and the scalars
};

struct Scalars {  // a tensor's, of one step, rounded to the arithmetic's fp32
  float beta1, rest1, beta2, rest2, eps, step_size, decay, taken;
};
constexpr int64_t kScalars = sizeof(Scalars) / sizeof(float);

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return add(multiply(a, b), c); }

template <class T>
__device__ __forceinline__ void load_as_float(const void* data, int64_t i, int64_t n, bool vector, float (&out)[4]) {
  const Four<T> loaded = load4(static_cast<const T*>(data), i, n, vector);
#pragma unroll
  for (int32_t j = 0; j < 4; ++j) out[j] = convert<float>(loaded.at[j]);
}

__device__ __forceinline__ void load_any(const void* data, int32_t type, int64_t i, int64_t n, bool vector,
                                         float (&out)[4]) {
  if (type == kFloat32) return load_as_float<float>(data, i, n, vector, out);
  if (type == kBFloat16) return load_as_float<__nv_bfloat16>(data, i, n, vector, out);
  return load_as_float<__half>(data, i, n, vector, out);
}

template <class T>
__device__ __forceinline__ void store_from_float(void* data, int64_t i, int64_t n, bool vector, const float (&in)[4]) {
  Four<T> rounded;
#pragma unroll
  for (int32_t j = 0; j < 4; ++j) rounded.at[j] = convert<T>(in[j]);
  store4(static_cast<T*>(data), i, n, vector, rounded);
}

__device__ __forceinline__ void store_any(void* data, int32_t type, int64_t i, int64_t n, bool vector,
                                          const float (&in)[4]) {
  if (type == kFloat32) return store_from_float<float>(data, i, n, vector, in);
  if (type == kBFloat16) return store_from_float<__nv_bfloat16>(data, i, n, vector, in);
  return store_from_float<__half>(data, i, n, vector, in);
}

__device__ void count_step(int64_t* counts, const double* h, bool finite, bool correct_bias, Scalars& s) {
  s.taken = finite ? 1.0f : 0.0f;
  if (!finite) {
    counts[1] += 1;
    return;
  }
  const double step = static_cast<double>(counts[0] += 1);
  const double lr = h[0], beta1 = h[1], beta2 = h[2];
  double step_size = lr;
  if (correct_bias) step_size *= sqrt(1.0 - pow(beta2, step)) / (1.0 - pow(beta1, step));
  s.beta1 = static_cast<float>(beta1);
  s.rest1 = static_cast<float>(1.0 - beta1);
  s.beta2 = static_cast<float>(beta2);
  s.rest2 = static_cast<float>(1.0 - beta2);
  s.eps = static_cast<float>(h[4]);
  s.step_size = static_cast<float>(step_size);
  s.decay = static_cast<float>(lr * h[5]);
}

__global__ void __launch_bounds__(kThreads)
    adam_flags_kernel(const __grid_constant__ ListTable<Entry> table, Scalars* scalars, int64_t* counts,
                      const double* hyper, bool correct_bias) {
  const Entry& e = table.entries[blockIdx.x];
  int32_t bad = 0;
  for (int64_t i = int64_t{threadIdx.x} * 4; i < e.n; i += kBlockElements) {
    float g[4];
    load_any(e.grad, e.grad_type, i, e.n, e.vector, g);
#pragma unroll
    for (int32_t j = 0; j < 4; ++j) bad |= !isfinite(g[j]);
  }
  bad = __syncthreads_or(bad);
  if (threadIdx.x == 0) {
    count_step(counts + 2 * int64_t{e.row}, hyper + 6 * int64_t{e.row}, !bad, correct_bias, scalars[e.row]);
  }
}

__global__ void __launch_bounds__(kThreads)
    adam_update_kernel(const __grid_constant__ ListTable<Entry> table, const Scalars* scalars) {
  const int32_t index = table.entry_of(blockIdx.x);
  const Entry& e = table.entries[index];
  const Scalars s = scalars[e.row];
  if (s.taken == 0.0f) return;
  const int64_t begin = int64_t{static_cast<int32_t>(blockIdx.x) - table.first_block[index]} * kBlockElements;
  const int64_t i = begin + int64_t{threadIdx.x} * 4;
  if (i >= e.n) return;
  float p[4], g[4];
  load_any(e.param, e.param_type, i, e.n, e.vector, p);
  load_any(e.grad, e.grad_type, i, e.n, e.vector, g);
  Four<float> m = load4(e.m, i, e.n, e.vector);
  Four<float> v = load4(e.v, i, e.n, e.vector);
#pragma unroll
  for (int32_t j = 0; j < 4; ++j) {
    m.at[j] = multiply_add(m.at[j], s.beta1, multiply(s.rest1, g[j]));
    v.at[j] = multiply_add(v.at[j], s.beta2, multiply(s.rest2, multiply(g[j], g[j])));
    const float direction = __fdiv_rn(m.at[j], add(__fsqrt_rn(v.at[j]), s.eps));
    const float value = add(p[j], -multiply(s.step_size, direction));
    p[j] = add(value, -multiply(s.decay, value));
  }
  store4(e.m, i, e.n, e.vector, m);
  store4(e.v, i, e.n, e.vector, v);
  store_any(e.param, e.param_type, i, e.n, e.vector, p);
}

bool readable(const Tensor& tensor) {
  const int32_t type = dtype_code(tensor);
  return type == kFloat32 || type == kBFloat16 || type == kFloat16;
}

bool takes(const Tensor& p, const Tensor& g, const Tensor& m, const Tensor& v, const Tensor& counts) {
  if (!readable(p) || !readable(g) || dtype_code(m) != kFloat32 || dtype_code(v) != kFloat32) return false;
  if (!p.is_cuda() || p.get_device_index() != counts.get_device_index()) return false;
  if (!alike(p, g) || !alike(p, m) || !alike(p, v)) return false;
  return !overlap(p, g) && !overlap(p, m) && !overlap(p, v) && !overlap(g, m) && !overlap(g, v) && !overlap(m, v);
}

bool fits(const Tensor& table, ScalarType type, int64_t rows, int64_t columns) {
  return table.is_cuda() && table.scalar_type() == type && table.is_contiguous() && table.dim() == 2 &&
         table.size(0) == rows && table.size(1) == columns;
}

struct Step {
  Scalars* scalars;
  int64_t* counts;
  const double* hyper;
  bool correct_bias;
  cudaStream_t stream;
};

void launch(ListTable<Entry>& table, const Step& step) {
  if (table.count == 0) return;
  adam_flags_kernel<<<table.count, kThreads, 0, step.stream>>>(table, step.scalars, step.counts, step.hyper,
                                                               step.correct_bias);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (table.blocks > 0) {
    adam_update_kernel<<<table.blocks, kThreads, 0, step.stream>>>(table, step.scalars);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  table.count = table.blocks = 0;
}

// Returns false, having launched nothing, where the lists are not what the kernels can walk.
bool adam_update_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avg,
                  std::vector<Tensor> exp_avg_sq, Tensor counts, Tensor hyper, bool correct_bias,
                  bool normalize_grads) {
  const size_t n = params.size();
  if (normalize_grads || n == 0 || grads.size() != n || exp_avg.size() != n || exp_avg_sq.size() != n) return false;
  const int64_t rows = static_cast<int64_t>(n);
  if (!fits(counts, ScalarType::Long, rows, 2) || !fits(hyper, ScalarType::Double, rows, 6)) return false;
  if (hyper.get_device_index() != counts.get_device_index()) return false;
  for (size_t t = 0; t < n; ++t) {
    if (!takes(params[t], grads[t], exp_avg[t], exp_avg_sq[t], counts)) return false;
  }
  const torch::stable::accelerator::DeviceGuard guard(counts.get_device_index());
  // fp64 rows of hyper's device, used as bytes: kScalars floats for each tensor
  Tensor scalars = torch::stable::new_empty(hyper, {rows * kScalars / 2});
  const Step step{static_cast<Scalars*>(scalars.mutable_data_ptr()), static_cast<int64_t*>(counts.mutable_data_ptr()),
                  static_cast<const double*>(hyper.const_data_ptr()), correct_bias, current_stream(counts)};
  ListTable<Entry> table;
  for (size_t t = 0; t < n; ++t) {
    const Tensor &p = params[t], &g = grads[t], &m = exp_avg[t], &v = exp_avg_sq[t];
    Entry e{p.mutable_data_ptr(),
            g.const_data_ptr(),
            static_cast<float*>(m.mutable_data_ptr()),
            static_cast<float*>(v.mutable_data_ptr()),
            p.numel(),
            dtype_code(p),
            dtype_code(g),
            0,
            static_cast<int32_t>(t)};
    e.vector = aligned4(e.param, p.element_size()) && aligned4(e.grad, g.element_size()) && aligned4(e.m, 4) &&
               aligned4(e.v, 4);
    if (table.full()) launch(table, step);
    // an empty tensor takes its step too: no blocks, which entry_of passes over
    table.add(e, static_cast<int32_t>((e.n + kBlockElements - 1) / kBlockElements));
  }
  launch(table, step);
  return true;
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cuda, m) {
  m.def(
      "adam_update_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
      "Tensor(d!) counts, Tensor hyper, bool correct_bias, bool normalize_grads) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("adam_update_", TORCH_BOX(&lic_fast::adam_update_));
}
