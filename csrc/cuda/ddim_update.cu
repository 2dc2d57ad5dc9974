// An update of a diffusion sampler, one launch; lic_fast/reference/ddim_update.py says what each element gets:
//     out = a x + b clamp(f) + noise n
// Reads x and f once and writes out once. A thread takes four neighbours: a vector of each tensor, and one block of
// Philox. Takes x, f and out dense and alike (row-major where there is noise), in fp32, bf16, fp16 or fp64. Arithmetic
// is unfused, in fp32, or in fp64 for fp64.
#include "common/normal.h"
#include "cuda/device.cuh"

namespace lic_fast {
namespace {

constexpr int32_t kThreads = 256;
constexpr int64_t kBlockElements = int64_t{4} * kThreads;

struct Update {
  const void* x;
  const void* f;
  void* out;
  int64_t n;
  const int64_t* seed;  // null without noise
  double a, b, clamp, noise;
  bool vector;
};

template <class T, class Acc>
__global__ void __launch_bounds__(kThreads) ddim_update_kernel(Update u) {
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * 4;
  if (i >= u.n) return;
  const Acc a = static_cast<Acc>(u.a), b = static_cast<Acc>(u.b);
  const Acc most = static_cast<Acc>(u.clamp), noise = static_cast<Acc>(u.noise);
  Four<T> x = load4(static_cast<const T*>(u.x), i, u.n, u.vector);
  const Four<T> f = load4(static_cast<const T*>(u.f), i, u.n, u.vector);
  float uniforms[4] = {};
  if (u.seed) uniform4(*u.seed, i, uniforms);
#pragma unroll
  for (int32_t j = 0; j < 4; ++j) {
    const Acc value = convert<Acc>(f.at[j]), below = value > most ? most : value;  // NaN stays
    const Acc bounded = below < -most ? -most : below;
    Acc sum = add(multiply(convert<Acc>(x.at[j]), a), multiply(bounded, b));
    if (u.seed) sum = add(sum, multiply(static_cast<Acc>(normal_of(uniforms[j])), noise));
    x.at[j] = convert<T>(sum);
  }
  store4(static_cast<T*>(u.out), i, u.n, u.vector, x);
}

template <class T, class Acc>
void launch(const Update& u, cudaStream_t stream) {
  const int64_t blocks = (u.n + kBlockElements - 1) / kBlockElements;
  STD_TORCH_CHECK(blocks <= INT32_MAX, "lic_fast: ddim_update takes up to 2**41 elements, got ", u.n);
  ddim_update_kernel<T, Acc><<<static_cast<uint32_t>(blocks), kThreads, 0, stream>>>(u);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void ddim_update_out(Tensor x, Tensor f, Tensor seed, double a, double b, double clamp, double noise, Tensor out) {
  const int32_t dtype = dtype_code(x);
  STD_TORCH_CHECK(dtype_code(f) == dtype && dtype_code(out) == dtype && alike(x, f) && alike(x, out),
                  "lic_fast: ddim_update takes dense tensors alike");
  const bool noisy = seed.numel() != 0;
  STD_TORCH_CHECK(!noisy || x.is_contiguous(), "lic_fast: ddim_update counts noise in row-major order");
  if (x.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Update u{x.const_data_ptr(),
           f.const_data_ptr(),
           out.mutable_data_ptr(),
           x.numel(),
           noisy ? static_cast<const int64_t*>(seed.const_data_ptr()) : nullptr,
           a,
           b,
           clamp,
           noise,
           false};
  const int64_t size = x.element_size();
  u.vector = aligned4(u.x, size) && aligned4(u.f, size) && aligned4(u.out, size);
  const cudaStream_t stream = current_stream(x);
  switch (dtype) {
    case kFloat32: return launch<float, float>(u, stream);
    case kBFloat16: return launch<__nv_bfloat16, float>(u, stream);
    case kFloat16: return launch<__half, float>(u, stream);
    case kFloat64: return launch<double, double>(u, stream);
    default: STD_TORCH_CHECK(false, "lic_fast: ddim_update takes float32, bfloat16, float16 and float64");
  }
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cuda, m) {
  m.def(
      "ddim_update_out(Tensor x, Tensor f, Tensor seed, float a, float b, float clamp, float noise, Tensor(a!) out)"
      " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("ddim_update_out", TORCH_BOX(&lic_fast::ddim_update_out));
}
