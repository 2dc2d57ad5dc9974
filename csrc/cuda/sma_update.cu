// Sampling-then-moving average over a list of tensors, one launch:
//     slow <- slow + alpha * (fast - slow);  fast <- slow where reset
// Reads slow and fast once, writes slow once and fast once where reset: 16 bytes an element in fp32, no other
// traffic, so the schedule only has to keep enough loads in flight: each thread owns kVectors vectors of four
// elements, all loaded before the first is used, neighbours in a warp 16 bytes apart. The list travels in the kernel's
// parameters (csrc/common/list.h); a block finds its tensor by bisection over at most a thousand entries.
// Takes slow fp32 with fast fp32, bf16, fp16 or fp64, and slow fp64 with fast fp64; tensors dense, a pair laid out
// alike. Arithmetic is unfused, in fp32, or in fp64 where fast is fp64.
#include "common/list.h"
#include "cuda/device.cuh"

namespace lic_fast {
namespace {

constexpr int32_t kThreads = 256;
constexpr int32_t kVectors = 2;
constexpr int64_t kBlockElements = int64_t{4} * kThreads * kVectors;

struct Entry {
  void* slow;
  void* fast;
  int64_t n;
  int32_t types;
  int32_t vector;
};

enum Types : int32_t { kF32F32, kF32BF16, kF32F16, kF32F64, kF64F64 };

template <class Slow, class Fast, class Acc>
__device__ __forceinline__ void average(const Entry& e, int64_t begin, double alpha_in, bool reset) {
  Slow* slow = static_cast<Slow*>(e.slow);
  Fast* fast = static_cast<Fast*>(e.fast);
  const Acc alpha = static_cast<Acc>(alpha_in);
  Four<Slow> s[kVectors];
  Four<Fast> f[kVectors];
#pragma unroll
  for (int32_t v = 0; v < kVectors; ++v) {
    const int64_t i = begin + (int64_t{v} * kThreads + threadIdx.x) * 4;
    s[v] = load4(slow, i, e.n, e.vector);
    f[v] = load4(fast, i, e.n, e.vector);
  }
#pragma unroll
  for (int32_t v = 0; v < kVectors; ++v) {
    const int64_t i = begin + (int64_t{v} * kThreads + threadIdx.x) * 4;
#pragma unroll
    for (int32_t j = 0; j < 4; ++j) {
      const Acc old = convert<Acc>(s[v].at[j]);
      const Acc step = multiply(alpha, add(convert<Acc>(f[v].at[j]), -old));
      s[v].at[j] = convert<Slow>(add(old, step));
      f[v].at[j] = convert<Fast>(s[v].at[j]);
    }
    store4(slow, i, e.n, e.vector, s[v]);
    if (reset) store4(fast, i, e.n, e.vector, f[v]);
  }
}

__global__ void __launch_bounds__(kThreads)
    sma_update_kernel(const __grid_constant__ ListTable<Entry> table, double alpha, bool reset) {
  const int32_t index = table.entry_of(blockIdx.x);
  const Entry& e = table.entries[index];
  const int64_t begin = int64_t{static_cast<int32_t>(blockIdx.x) - table.first_block[index]} * kBlockElements;
  switch (e.types) {
    case kF32F32: return average<float, float, float>(e, begin, alpha, reset);
    case kF32BF16: return average<float, __nv_bfloat16, float>(e, begin, alpha, reset);
    case kF32F16: return average<float, __half, float>(e, begin, alpha, reset);
    case kF32F64: return average<float, double, double>(e, begin, alpha, reset);
    default: return average<double, double, double>(e, begin, alpha, reset);
  }
}

int32_t types_code(const Tensor& slow, const Tensor& fast) {  // -1 where no loop reads the pair
  const int32_t s = dtype_code(slow), f = dtype_code(fast);
  if (s == kFloat32 && f == kFloat32) return kF32F32;
  if (s == kFloat32 && f == kBFloat16) return kF32BF16;
  if (s == kFloat32 && f == kFloat16) return kF32F16;
  if (s == kFloat32 && f == kFloat64) return kF32F64;
  return s == kFloat64 && f == kFloat64 ? kF64F64 : -1;
}

void launch(const ListTable<Entry>& table, double alpha, bool reset, cudaStream_t stream) {
  if (table.blocks == 0) return;
  sma_update_kernel<<<table.blocks, kThreads, 0, stream>>>(table, alpha, reset);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Returns false, having launched nothing, where the lists are not pairs that the kernel can walk.
bool sma_update_(std::vector<Tensor> slow, std::vector<Tensor> fast, double alpha, bool reset) {
  if (slow.empty() || slow.size() != fast.size()) return false;
  for (size_t t = 0; t < slow.size(); ++t) {
    if (types_code(slow[t], fast[t]) < 0 || !slow[t].is_cuda() || !alike(slow[t], fast[t])) return false;
    if (slow[t].get_device_index() != slow[0].get_device_index()) return false;
    if (overlap(slow[t], fast[t])) return false;
  }
  const torch::stable::accelerator::DeviceGuard guard(slow[0].get_device_index());
  const cudaStream_t stream = current_stream(slow[0]);
  ListTable<Entry> table;
  for (size_t t = 0; t < slow.size(); ++t) {
    if (slow[t].numel() == 0) continue;
    Entry e{slow[t].mutable_data_ptr(), fast[t].mutable_data_ptr(), slow[t].numel(), types_code(slow[t], fast[t]), 0};
    e.vector = aligned4(e.slow, slow[t].element_size()) && aligned4(e.fast, fast[t].element_size());
    if (table.full()) {
      launch(table, alpha, reset, stream);
      table.count = table.blocks = 0;
    }
    table.add(e, static_cast<int32_t>((e.n + kBlockElements - 1) / kBlockElements));
  }
  launch(table, alpha, reset, stream);
  return true;
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cuda, m) {
  m.def("sma_update_(Tensor(a!)[] slow, Tensor(b!)[] fast, float alpha, bool reset) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("sma_update_", TORCH_BOX(&lic_fast::sma_update_));
}
