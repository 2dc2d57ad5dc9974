// Steps of a latent's schedule: elements of a strided slice of y [B, C, H, W] to symbols and levels, and back.
//
// A thread takes an element of the step, neighbours in a row neighbours in everything but y and y_hat, which lie a
// stride apart: of their sectors 1 / stride is of use at least. Steps of a photograph's latent have 10 to 300 thousand
// elements: a launch each, a few microseconds. Arithmetic is unfused.
#include "common/schedule.h"
#include "cuda/device.cuh"

namespace lic_fast {
namespace {

constexpr int32_t kThreads = 256;

struct Parts {
  const float *y, *parameters;
  float *y_hat, *values;
  int32_t* symbols;
  uint8_t* levels;
};

__global__ void __launch_bounds__(kThreads) schedule_quantize_kernel(const Step step, const Parts parts) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= step.rows() * step.w) return;
  const int64_t r = i / step.w, j = i % step.w;
  const int64_t at = step.in_latent(r) + j * step.stride, scale = step.in_scales(r) + j;
  const float mean = parts.parameters[scale + step.to_means()];
  float rounded = rintf(add(parts.y[at], -mean));
  rounded = rounded > -kMostSymbol ? rounded : -kMostSymbol;  // NaN too
  rounded = rounded < kMostSymbol ? rounded : kMostSymbol;
  const float value = add(rounded, mean);
  parts.symbols[i] = static_cast<int32_t>(rounded);
  parts.levels[i] = level_of_scale(parts.parameters[scale]);
  parts.values[i] = value;
  parts.y_hat[at] = value;
}

__global__ void __launch_bounds__(kThreads) schedule_dequantize_kernel(const Step step, const Parts parts) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= step.rows() * step.w) return;
  const int64_t r = i / step.w, j = i % step.w;
  const float mean = parts.parameters[step.in_scales(r) + j + step.to_means()];
  const float value = add(static_cast<float>(parts.symbols[i]), mean);
  parts.values[i] = value;
  parts.y_hat[step.in_latent(r) + j * step.stride] = value;
}

__global__ void __launch_bounds__(kThreads)
    schedule_levels_kernel(const float* parameters, uint8_t* levels, int64_t n, int64_t total) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < total) levels[i] = level_of_scale(parameters[i + i / n * n]);
}

uint32_t blocks_for(int64_t elements) { return static_cast<uint32_t>((elements + kThreads - 1) / kThreads); }

bool on_device(const Tensor& like, std::initializer_list<const Tensor*> others) {
  for (const Tensor* tensor : others) {
    if (!tensor->is_cuda() || tensor->get_device_index() != like.get_device_index()) return false;
  }
  return like.is_cuda();
}

bool schedule_quantize_(Tensor y_hat, Tensor y, Tensor parameters, Tensor symbols, Tensor levels, Tensor values,
                        int64_t first, int64_t row, int64_t column, int64_t stride) {
  Step step{};
  step.first = first, step.row = row, step.column = column, step.stride = stride;
  if (!on_device(y_hat, {&y, &parameters, &symbols, &levels, &values})) return false;
  if (!is_step(y_hat, symbols, parameters, &step) || !alike(y_hat, y)) return false;
  if (!alike(symbols, levels) || !alike(symbols, values)) return false;
  if (symbols.numel() == 0) return true;
  const torch::stable::accelerator::DeviceGuard guard(y_hat.get_device_index());
  const Parts parts{
      static_cast<const float*>(y.const_data_ptr()),     static_cast<const float*>(parameters.const_data_ptr()),
      static_cast<float*>(y_hat.mutable_data_ptr()),     static_cast<float*>(values.mutable_data_ptr()),
      static_cast<int32_t*>(symbols.mutable_data_ptr()), static_cast<uint8_t*>(levels.mutable_data_ptr())};
  schedule_quantize_kernel<<<blocks_for(symbols.numel()), kThreads, 0, current_stream(y_hat)>>>(step, parts);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return true;
}

bool schedule_dequantize_(Tensor y_hat, Tensor symbols, Tensor parameters, Tensor values, int64_t first, int64_t row,
                          int64_t column, int64_t stride) {
  Step step{};
  step.first = first, step.row = row, step.column = column, step.stride = stride;
  if (!on_device(y_hat, {&symbols, &parameters, &values})) return false;
  if (!is_step(y_hat, symbols, parameters, &step) || !alike(symbols, values)) return false;
  if (symbols.numel() == 0) return true;
  const torch::stable::accelerator::DeviceGuard guard(y_hat.get_device_index());
  const Parts parts{nullptr,
                    static_cast<const float*>(parameters.const_data_ptr()),
                    static_cast<float*>(y_hat.mutable_data_ptr()),
                    static_cast<float*>(values.mutable_data_ptr()),
                    static_cast<int32_t*>(const_cast<void*>(symbols.const_data_ptr())),
                    nullptr};
  schedule_dequantize_kernel<<<blocks_for(symbols.numel()), kThreads, 0, current_stream(y_hat)>>>(step, parts);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return true;
}

bool schedule_levels_out(Tensor parameters, Tensor levels) {
  if (!on_device(parameters, {&levels}) || !parameters.is_contiguous() || !levels.is_contiguous()) return false;
  if (parameters.numel() != 2 * levels.numel()) return false;
  if (levels.numel() == 0) return true;
  const torch::stable::accelerator::DeviceGuard guard(levels.get_device_index());
  schedule_levels_kernel<<<blocks_for(levels.numel()), kThreads, 0, current_stream(levels)>>>(
      static_cast<const float*>(parameters.const_data_ptr()), static_cast<uint8_t*>(levels.mutable_data_ptr()),
      levels.numel() / levels.size(0), levels.numel());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return true;
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cuda, m) {
  m.def(
      "schedule_quantize_(Tensor(a!) y_hat, Tensor y, Tensor parameters, Tensor(b!) symbols, Tensor(c!) levels,"
      " Tensor(d!) values, int first, int row, int column, int stride) -> bool");
  m.def(
      "schedule_dequantize_(Tensor(a!) y_hat, Tensor symbols, Tensor parameters, Tensor(b!) values, int first,"
      " int row, int column, int stride) -> bool");
  m.def("schedule_levels_out(Tensor parameters, Tensor(a!) levels) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("schedule_quantize_", TORCH_BOX(&lic_fast::schedule_quantize_));
  m.impl("schedule_dequantize_", TORCH_BOX(&lic_fast::schedule_dequantize_));
  m.impl("schedule_levels_out", TORCH_BOX(&lic_fast::schedule_levels_out));
}
