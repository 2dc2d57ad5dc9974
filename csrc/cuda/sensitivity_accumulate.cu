// Sums of the weights' sensitivities over a list of tensors, one launch:
//     s <- s + |w * g|  (taylor),  g * g  (fisher)  or  |g|  (magnitude);  a term that is not finite counts as 0
// Reads s, w and g once and writes s once: 16 bytes an element in fp32; fisher and magnitude do not read w. Each thread
// owns kVectors vectors of four elements, all loaded before the first is used, neighbours in a warp 16 bytes apart. The
// list travels in the kernel's parameters (csrc/common/list.h). Takes w and g fp32, bf16 or fp16 with s fp32, and all
// three fp64; s has one dimension, w and g are dense and laid out alike: elements pair in the order of memory. A tensor
// whose g is empty is left alone. Arithmetic is unfused, in s's dtype.
#include "common/list.h"
#include "cuda/device.cuh"

namespace lic_fast {
namespace {

constexpr int32_t kThreads = 256;
constexpr int32_t kVectors = 2;
constexpr int64_t kBlockElements = int64_t{4} * kThreads * kVectors;

enum Kind : int64_t { kTaylor, kFisher, kMagnitude, kKinds };

struct Entry {
  void* s;
  const void* w;
  const void* g;
  int64_t n;
  int32_t type;  // of w and g
  int32_t vector;
};

template <class T, class Acc>
__device__ __forceinline__ void accumulate(const Entry& e, int64_t begin, int64_t kind) {
  Acc* sum = static_cast<Acc*>(e.s);
  Four<Acc> s[kVectors];
  Four<T> w[kVectors], g[kVectors];
#pragma unroll
  for (int32_t v = 0; v < kVectors; ++v) {
    const int64_t i = begin + (int64_t{v} * kThreads + threadIdx.x) * 4;
    s[v] = load4(sum, i, e.n, e.vector);
    g[v] = load4(static_cast<const T*>(e.g), i, e.n, e.vector);
    w[v] = kind == kTaylor ? load4(static_cast<const T*>(e.w), i, e.n, e.vector) : g[v];
  }
#pragma unroll
  for (int32_t v = 0; v < kVectors; ++v) {
    const int64_t i = begin + (int64_t{v} * kThreads + threadIdx.x) * 4;
#pragma unroll
    for (int32_t j = 0; j < 4; ++j) {
      const Acc slope = convert<Acc>(g[v].at[j]);
      Acc term = kind == kMagnitude ? slope : multiply(convert<Acc>(w[v].at[j]), slope);
      term = fabs(term);
      s[v].at[j] = add(s[v].at[j], isfinite(term) ? term : Acc(0));
    }
    store4(sum, i, e.n, e.vector, s[v]);
  }
}

__global__ void __launch_bounds__(kThreads)
    sensitivity_accumulate_kernel(const __grid_constant__ ListTable<Entry> table, int64_t kind) {
  const int32_t index = table.entry_of(blockIdx.x);
  const Entry& e = table.entries[index];
  const int64_t begin = int64_t{static_cast<int32_t>(blockIdx.x) - table.first_block[index]} * kBlockElements;
  switch (e.type) {
    case kFloat32: return accumulate<float, float>(e, begin, kind);
    case kBFloat16: return accumulate<__nv_bfloat16, float>(e, begin, kind);
    case kFloat16: return accumulate<__half, float>(e, begin, kind);
    default: return accumulate<double, double>(e, begin, kind);
  }
}

bool walkable(const Tensor& s, const Tensor& w, const Tensor& g) {
  const int32_t type = dtype_code(w);
  if (type != kFloat32 && type != kBFloat16 && type != kFloat16 && type != kFloat64) return false;
  if (dtype_code(s) != (type == kFloat64 ? kFloat64 : kFloat32)) return false;
  if (!s.is_cuda() || !w.is_cuda() || s.get_device_index() != w.get_device_index()) return false;
  if (s.dim() != 1 || !s.is_contiguous() || s.numel() != w.numel()) return false;
  if (g.numel() == 0) return true;
  return dtype_code(g) == type && alike(w, g) && !overlap(s, w) && !overlap(s, g);
}

void launch(ListTable<Entry>& table, int64_t kind, cudaStream_t stream) {
  if (table.blocks > 0) {
    sensitivity_accumulate_kernel<<<table.blocks, kThreads, 0, stream>>>(table, kind);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  table.count = table.blocks = 0;
}

// Returns false, having launched nothing, where the lists are not what the kernel can walk.
bool sensitivity_accumulate_(std::vector<Tensor> s, std::vector<Tensor> w, std::vector<Tensor> g, int64_t kind) {
  if (w.empty() || s.size() != w.size() || g.size() != w.size() || kind < 0 || kind >= kKinds) return false;
  for (size_t t = 0; t < w.size(); ++t) {
    if (!walkable(s[t], w[t], g[t]) || w[t].get_device_index() != w[0].get_device_index()) return false;
  }
  const torch::stable::accelerator::DeviceGuard guard(w[0].get_device_index());
  const cudaStream_t stream = current_stream(w[0]);
  ListTable<Entry> table;
  for (size_t t = 0; t < w.size(); ++t) {
    if (g[t].numel() == 0) continue;
    Entry e{s[t].mutable_data_ptr(), w[t].const_data_ptr(), g[t].const_data_ptr(), w[t].numel(), dtype_code(w[t]), 0};
    e.vector =
        aligned4(e.s, s[t].element_size()) && aligned4(e.w, w[t].element_size()) && aligned4(e.g, g[t].element_size());
    if (table.full()) launch(table, kind, stream);
    table.add(e, static_cast<int32_t>((e.n + kBlockElements - 1) / kBlockElements));
  }
  launch(table, kind, stream);
  return true;
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cuda, m) {
  m.def("sensitivity_accumulate_(Tensor(a!)[] s, Tensor[] params, Tensor[] grads, int kind) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("sensitivity_accumulate_", TORCH_BOX(&lic_fast::sensitivity_accumulate_));
}
