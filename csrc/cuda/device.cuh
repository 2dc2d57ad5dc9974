// What the CUDA kernels share: the current stream, conversions, vectors of four.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "common/tensors.h"

namespace lic_fast {

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <class To, class From>
__device__ __forceinline__ To convert(From value) {
  return static_cast<To>(value);
}
template <>
__device__ __forceinline__ float convert<float, __nv_bfloat16>(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 convert<__nv_bfloat16, float>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ double convert<double, __nv_bfloat16>(__nv_bfloat16 value) {
  return static_cast<double>(__bfloat162float(value));
}
template <>
__device__ __forceinline__ float convert<float, __half>(__half value) {
  return __half2float(value);
}
template <>
__device__ __forceinline__ __half convert<__half, float>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ double convert<double, __half>(__half value) {
  return static_cast<double>(__half2float(value));
}

// Unfused multiply and add: the same rounding as eager PyTorch and the C++ and Triton kernels.
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }

template <class T>
struct alignas(sizeof(T) * 4) Four {  // one aligned access of 4 to 16 bytes; 32 bytes (fp64) become two
  T at[4];
};
template <>
struct alignas(16) Four<double> {
  double at[4];
};

template <class T>
__device__ __forceinline__ Four<T> load4(const T* data, int64_t i, int64_t n, bool vector) {
  if (vector && i + 4 <= n) return *reinterpret_cast<const Four<T>*>(data + i);
  Four<T> result{};
  for (int32_t j = 0; j < 4; ++j) {
    if (i + j < n) result.at[j] = data[i + j];
  }
  return result;
}

template <class T>
__device__ __forceinline__ void store4(T* data, int64_t i, int64_t n, bool vector, const Four<T>& value) {
  if (vector && i + 4 <= n) {
    *reinterpret_cast<Four<T>*>(data + i) = value;
    return;
  }
  for (int32_t j = 0; j < 4; ++j) {
    if (i + j < n) data[i + j] = value.at[j];
  }
}

// Whether `data` can be read in vectors of four elements of `size` bytes.
inline bool aligned4(const void* data, int64_t size) {
  const int64_t step = size >= 4 ? 16 : 4 * size;
  return reinterpret_cast<uintptr_t>(data) % step == 0;
}

}  // namespace lic_fast
