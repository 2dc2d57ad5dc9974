// The integers of mixtures: a thread an element, the arithmetic of common/rans_mixture_parameters.h, which reads the
// components' planes two or three times, the last ones from the cache. Neighbours in a warp are neighbours in memory:
// it takes 12 bytes a component from memory and puts back 8, and 8 an element, and is bound by that or by two divisions
// a component. Nothing is waited for.
#include "common/rans_mixture_parameters.h"

#include "cuda/device.cuh"

namespace lic_fast {
namespace {

constexpr int32_t kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    mixture_kernel(rans::MixtureInputs in, const int64_t* packed, int32_t packed_words, int64_t elements) {
  __shared__ float reach[17];
  __shared__ int32_t steps;
  if (threadIdx.x < 17) {
    rans::MixtureTables tables;
    const bool opened = rans::open(packed, packed_words, &tables);
    reach[threadIdx.x] = opened ? __fmul_rn(static_cast<float>(tables.reach[threadIdx.x]), 0.0625f) : 0.0f;
    if (threadIdx.x == 0) steps = opened ? tables.steps : 1;
  }
  __syncthreads();
  in.reach = reach;
  in.steps = static_cast<float>(steps);
  const int64_t planes = static_cast<int64_t>(blockIdx.y) * in.components * in.stride;
  in.scales += planes, in.means += planes, in.weights += planes;
  in.words += static_cast<int64_t>(blockIdx.y) * (2 + 2 * in.components) * in.stride;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < elements; i += step) {
    rans::mixture_words(in, i);
  }
}

template <class T>
const T* data_of(const Tensor& tensor, ScalarType type, const Tensor& like) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.is_contiguous() && tensor.is_cuda() &&
                      tensor.get_device_index() == like.get_device_index(),
                  "rans_coder: a contiguous tensor of another dtype, or on another device, is needed");
  return static_cast<const T*>(tensor.const_data_ptr());
}

// As lic_fast_cpp::rans_coder_mixture, on the current stream.
Tensor rans_coder_mixture(Tensor scales, Tensor means, Tensor weights, Tensor packed) {
  check_same_numel(scales, means);
  check_same_numel(scales, weights);
  STD_TORCH_CHECK(packed.numel() == rans::kMixtureWords && scales.dim() == 3 && scales.size(1) >= 1 &&
                      scales.size(1) <= rans::kMostComponents,
                  "rans_coder: 1 to 16 components and tables of mixtures are needed");
  const torch::stable::accelerator::DeviceGuard guard(scales.get_device_index());
  const int64_t batch = scales.size(0), components = scales.size(1), n = scales.size(2);
  Tensor words = torch::stable::new_empty(scales, {batch, 2 + 2 * components, n}, ScalarType::Int);
  const int64_t* table = data_of<int64_t>(packed, ScalarType::Long, scales);
  rans::MixtureInputs in{data_of<float>(scales, ScalarType::Float, scales),
                         data_of<float>(means, ScalarType::Float, scales),
                         data_of<float>(weights, ScalarType::Float, scales),
                         n,
                         static_cast<int32_t>(components),
                         0.0f,
                         nullptr,
                         static_cast<int32_t*>(words.mutable_data_ptr())};
  constexpr int64_t kMostRows = 65535;  // of a grid
  const auto blocks = static_cast<uint32_t>(std::min<int64_t>((n + kThreads - 1) / kThreads, int64_t{1} << 20));
  for (int64_t first = 0; n > 0 && first < batch; first += kMostRows) {
    const auto rows = static_cast<uint32_t>(std::min(kMostRows, batch - first));
    mixture_kernel<<<dim3(blocks, rows), kThreads, 0, current_stream(scales)>>>(
        in, table, static_cast<int32_t>(packed.numel()), n);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    in.scales += rows * components * n, in.means += rows * components * n, in.weights += rows * components * n;
    in.words += rows * (2 + 2 * components) * n;
  }
  return words;
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cuda, m) {
  m.def("rans_coder_mixture(Tensor scales, Tensor means, Tensor weights, Tensor packed) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("rans_coder_mixture", TORCH_BOX(&lic_fast::rans_coder_mixture));
}
