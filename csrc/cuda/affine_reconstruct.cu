// Element-wise affine reconstruction: out_i = k_i * refs[mode_i] + d_i where tied_i, else w_i; and its gradients.
//
// Forward, fp32, tied mask given: reads w, k, d (4 bytes each), mode and tied (1 each), writes out (4): 18 bytes an
// element, every byte once. refs (M values) is read through the read-only cache. A list is one launch: the table of
// pointers travels in the kernel's parameters, each thread owns kVectors vectors of four elements.
//
// Backward: one pass for the gradients of w, k, d, and a segment sum for refs that is the same in every run: a thread
// keeps a private sum for each of up to kModes modes in shared memory (column = thread, so no bank conflicts and no
// atomics), a block adds its columns in a fixed order in fp64, and a second launch adds the blocks in order. More than
// kModes modes are taken kModes at a time by the grid's second dimension, which reads k, grad and mode again.
//
// A mode outside [0, M) gives NaN (a kernel cannot raise, and a host check would wait for the device); it never reads
// outside refs. Takes w fp32, bf16, fp16, fp64; k, d and refs of w's dtype, or fp32 where w is bf16 or fp16; mode
// uint8, int16, int32. Tensors must be dense and laid out alike.
#include "common/embedding.h"
#include "common/list.h"
#include "cuda/device.cuh"

namespace lic_fast {
namespace {

constexpr int32_t kThreads = 256;
constexpr int32_t kVectors = 2;
constexpr int64_t kBlockElements = int64_t{4} * kThreads * kVectors;
constexpr int32_t kSumThreads = 128;
constexpr int32_t kModes = 32;  // 32 modes * 128 threads * 8 bytes = 32 KiB of shared memory
constexpr int32_t kSumBlocks = 1024;
constexpr int64_t kSumPartials = int64_t{1} << 22;  // 32 MiB of partial sums at the most

struct Entry {
  const void* w;  // backward: the gradient of out
  void* out;      // backward: the gradient of w, or null
  const void* k;
  const void* d;
  const void* mode;
  const uint8_t* tied;  // null where every element is tied
  int64_t n;
  int8_t types;
  int8_t mode_type;
  int8_t vector;
};

enum Types : int8_t { kF32F32, kBF16F32, kBF16BF16, kF16F32, kF16F16, kF64F64 };

template <class P, class Acc>
__device__ __forceinline__ Acc look_up(const void* refs, int32_t mode, int32_t modes) {
  const bool inside = mode >= 0 && mode < modes;
  return inside ? convert<Acc>(static_cast<const P*>(refs)[mode]) : static_cast<Acc>(__int_as_float(0x7FC00000));
}

template <class W, class P, class Mode, class Acc>
__device__ __forceinline__ void forward(const Entry& e, int64_t begin, const void* refs, int32_t modes) {
  const W* w = static_cast<const W*>(e.w);
  const P* k = static_cast<const P*>(e.k);
  const P* d = static_cast<const P*>(e.d);
  const Mode* mode = static_cast<const Mode*>(e.mode);
  Four<W> w4[kVectors];
  Four<P> k4[kVectors], d4[kVectors];
  Four<Mode> m4[kVectors];
  Four<uint8_t> t4[kVectors];
#pragma unroll
  for (int32_t v = 0; v < kVectors; ++v) {
    const int64_t i = begin + (int64_t{v} * kThreads + threadIdx.x) * 4;
    t4[v] = e.tied ? load4(e.tied, i, e.n, e.vector) : Four<uint8_t>{{1, 1, 1, 1}};
    if (e.tied) w4[v] = load4(w, i, e.n, e.vector);
    k4[v] = load4(k, i, e.n, e.vector);
    d4[v] = load4(d, i, e.n, e.vector);
    m4[v] = load4(mode, i, e.n, e.vector);
  }
#pragma unroll
  for (int32_t v = 0; v < kVectors; ++v) {
    const int64_t i = begin + (int64_t{v} * kThreads + threadIdx.x) * 4;
#pragma unroll
    for (int32_t j = 0; j < 4; ++j) {
      const Acc r = look_up<P, Acc>(refs, static_cast<int32_t>(m4[v].at[j]), modes);
      const Acc value = add(multiply(convert<Acc>(k4[v].at[j]), r), convert<Acc>(d4[v].at[j]));
      if (t4[v].at[j]) w4[v].at[j] = convert<W>(value);
    }
    store4(static_cast<W*>(e.out), i, e.n, e.vector, w4[v]);
  }
}

template <class W, class P, class Acc>
__device__ __forceinline__ void forward_by_mode(const Entry& e, int64_t begin, const void* refs, int32_t modes) {
  switch (e.mode_type) {
    case kUInt8: return forward<W, P, uint8_t, Acc>(e, begin, refs, modes);
    case kInt16: return forward<W, P, int16_t, Acc>(e, begin, refs, modes);
    default: return forward<W, P, int32_t, Acc>(e, begin, refs, modes);
  }
}

__global__ void __launch_bounds__(kThreads)
    affine_reconstruct_fwd_kernel(const __grid_constant__ ListTable<Entry> table, const void* refs, int32_t modes) {
  const int32_t index = table.entry_of(blockIdx.x);
  const Entry& e = table.entries[index];
  const int64_t begin = int64_t{static_cast<int32_t>(blockIdx.x) - table.first_block[index]} * kBlockElements;
  switch (e.types) {
    case kF32F32: return forward_by_mode<float, float, float>(e, begin, refs, modes);
    case kBF16F32: return forward_by_mode<__nv_bfloat16, float, float>(e, begin, refs, modes);
    case kBF16BF16: return forward_by_mode<__nv_bfloat16, __nv_bfloat16, float>(e, begin, refs, modes);
    case kF16F32: return forward_by_mode<__half, float, float>(e, begin, refs, modes);
    case kF16F16: return forward_by_mode<__half, __half, float>(e, begin, refs, modes);
    default: return forward_by_mode<double, double, double>(e, begin, refs, modes);
  }
}

template <class W, class P, class Mode, class Acc>
__global__ void __launch_bounds__(kThreads)
    affine_reconstruct_bwd_kernel(const W* grad, const Mode* mode, const P* refs, const uint8_t* tied, int64_t n,
                                  int32_t modes, bool vector, W* grad_w, P* grad_k, P* grad_d) {
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * 4;
  if (i >= n) return;
  const Four<W> g4 = load4(grad, i, n, vector);
  const Four<uint8_t> t4 = tied ? load4(tied, i, n, vector) : Four<uint8_t>{{1, 1, 1, 1}};
  if (grad_w) {
    Four<W> result;
#pragma unroll
    for (int32_t j = 0; j < 4; ++j) result.at[j] = t4.at[j] ? convert<W>(Acc(0)) : g4.at[j];
    store4(grad_w, i, n, vector, result);
  }
  if (grad_k) {
    const Four<Mode> m4 = load4(mode, i, n, vector);
    Four<P> result;
#pragma unroll
    for (int32_t j = 0; j < 4; ++j) {
      const Acc r = look_up<P, Acc>(refs, static_cast<int32_t>(m4.at[j]), modes);
      result.at[j] = convert<P>(t4.at[j] ? multiply(convert<Acc>(g4.at[j]), r) : Acc(0));
    }
    store4(grad_k, i, n, vector, result);
  }
  if (grad_d) {
    Four<P> result;
#pragma unroll
    for (int32_t j = 0; j < 4; ++j) result.at[j] = convert<P>(t4.at[j] ? convert<Acc>(g4.at[j]) : Acc(0));
    store4(grad_d, i, n, vector, result);
  }
}

template <class W, class P, class Mode, class Acc>
__global__ void __launch_bounds__(kSumThreads)
    affine_reconstruct_refs_kernel(const W* grad, const P* k, const Mode* mode, const uint8_t* tied, int64_t n,
                                   int32_t modes, bool vector, double* partial) {
  __shared__ double sums[kModes][kSumThreads];
  const int32_t first = static_cast<int32_t>(blockIdx.y) * kModes;
  const int32_t here = min(kModes, modes - first);
  for (int32_t m = 0; m < here; ++m) sums[m][threadIdx.x] = 0.0;
  const int64_t stride = int64_t{gridDim.x} * kSumThreads * 4;
  for (int64_t i = (int64_t{blockIdx.x} * kSumThreads + threadIdx.x) * 4; i < n; i += stride) {
    const Four<Mode> m4 = load4(mode, i, n, vector);
    const Four<W> g4 = load4(grad, i, n, vector);
    const Four<P> k4 = load4(k, i, n, vector);
    const Four<uint8_t> t4 = tied ? load4(tied, i, n, vector) : Four<uint8_t>{{1, 1, 1, 1}};
#pragma unroll
    for (int32_t j = 0; j < 4; ++j) {
      const int32_t m = static_cast<int32_t>(m4.at[j]) - first;
      if (i + j < n && t4.at[j] && m >= 0 && m < here) {
        sums[m][threadIdx.x] += static_cast<double>(multiply(convert<Acc>(k4.at[j]), convert<Acc>(g4.at[j])));
      }
    }
  }
  __syncthreads();
  for (int32_t width = kSumThreads / 2; width > 0; width >>= 1) {
    if (static_cast<int32_t>(threadIdx.x) < width) {
      for (int32_t m = 0; m < here; ++m) sums[m][threadIdx.x] += sums[m][threadIdx.x + width];
    }
    __syncthreads();
  }
  if (static_cast<int32_t>(threadIdx.x) < here) {
    partial[int64_t{blockIdx.x} * modes + first + threadIdx.x] = sums[threadIdx.x][0];
  }
}

__global__ void affine_reconstruct_sum_kernel(const double* partial, int32_t blocks, int32_t modes, double* grad_refs) {
  const int32_t m = static_cast<int32_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (m >= modes) return;
  double sum = 0.0;
  for (int32_t b = 0; b < blocks; ++b) sum += partial[int64_t{b} * modes + m];
  grad_refs[m] = sum;
}

int8_t types_code(const Tensor& w, const Tensor& k) {  // -1 where no kernel reads the pair
  const int32_t a = dtype_code(w), b = dtype_code(k);
  if (a == kFloat32 && b == kFloat32) return kF32F32;
  if (a == kBFloat16 && b == kFloat32) return kBF16F32;
  if (a == kBFloat16 && b == kBFloat16) return kBF16BF16;
  if (a == kFloat16 && b == kFloat32) return kF16F32;
  if (a == kFloat16 && b == kFloat16) return kF16F16;
  return a == kFloat64 && b == kFloat64 ? kF64F64 : -1;
}

Entry make_entry(const Tensor& w, const Tensor& out, const Tensor& k, const Tensor& d, const Tensor& mode,
                 const Tensor* tied) {
  for (const Tensor* t : {&out, &k, &d, &mode}) check_same_numel(w, *t);
  if (tied) check_same_numel(w, *tied);
  STD_TORCH_CHECK(types_code(w, k) >= 0, "affine_reconstruct: dtypes that the CUDA kernel does not read");
  Entry e{w.const_data_ptr(),
          out.mutable_data_ptr(),
          k.const_data_ptr(),
          d.const_data_ptr(),
          mode.const_data_ptr(),
          tied ? static_cast<const uint8_t*>(tied->const_data_ptr()) : nullptr,
          w.numel(),
          types_code(w, k),
          static_cast<int8_t>(dtype_code(mode)),
          0};
  e.vector = aligned4(e.w, w.element_size()) && aligned4(e.out, w.element_size()) && aligned4(e.k, k.element_size()) &&
             aligned4(e.d, d.element_size()) && aligned4(e.mode, mode.element_size()) && aligned4(e.tied, 1);
  return e;
}

void launch(const ListTable<Entry>& table, const Tensor& refs, cudaStream_t stream) {
  if (table.blocks == 0) return;
  affine_reconstruct_fwd_kernel<<<table.blocks, kThreads, 0, stream>>>(table, refs.const_data_ptr(),
                                                                       static_cast<int32_t>(refs.numel()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void add_entry(ListTable<Entry>& table, const Entry& e, const Tensor& refs, cudaStream_t stream) {
  if (e.n == 0) return;
  if (table.full()) {
    launch(table, refs, stream);
    table.count = table.blocks = 0;
  }
  table.add(e, static_cast<int32_t>((e.n + kBlockElements - 1) / kBlockElements));
}

bool affine_reconstruct_out(Tensor w, Tensor k, Tensor d, Tensor mode, Tensor refs, std::optional<Tensor> tied,
                            Tensor out) {
  const torch::stable::accelerator::DeviceGuard guard(w.get_device_index());
  const cudaStream_t stream = current_stream(w);
  ListTable<Entry> table;
  add_entry(table, make_entry(w, out, k, d, mode, tied ? &*tied : nullptr), refs, stream);
  launch(table, refs, stream);
  return true;
}

// 0: done. 1: the lists are not what the kernel can walk, nothing is written.
int64_t affine_reconstruct_(std::vector<Tensor> w, std::vector<Tensor> k, std::vector<Tensor> d,
                            std::vector<Tensor> mode, Tensor refs, std::vector<Tensor> tied) {
  if (!walkable(w, k, d, mode, refs, tied, true, types_code)) return 1;
  const torch::stable::accelerator::DeviceGuard guard(w[0].get_device_index());
  const cudaStream_t stream = current_stream(w[0]);
  ListTable<Entry> table;
  for (size_t t = 0; t < w.size(); ++t) {
    add_entry(table, make_entry(w[t], w[t], k[t], d[t], mode[t], tied.empty() ? nullptr : &tied[t]), refs, stream);
  }
  launch(table, refs, stream);
  return 0;
}

struct Backward {
  const Tensor &grad, &k, &mode, &refs;
  const uint8_t* tied;
  const Tensor &grad_w, &grad_k, &grad_d, &grad_refs;
  cudaStream_t stream;

  template <class T>
  static T* wanted(const Tensor& t) {
    return t.numel() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
  }

  template <class W, class P, class Mode, class Acc>
  void run() const {
    const int64_t n = grad.numel();
    const int32_t modes = static_cast<int32_t>(refs.numel());
    const W* g = static_cast<const W*>(grad.const_data_ptr());
    const P* k_data = static_cast<const P*>(k.const_data_ptr());
    const Mode* m = static_cast<const Mode*>(mode.const_data_ptr());
    W* gw = wanted<W>(grad_w);
    P *gk = wanted<P>(grad_k), *gd = wanted<P>(grad_d);
    const bool vector = aligned4(g, sizeof(W)) && aligned4(k_data, sizeof(P)) && aligned4(m, sizeof(Mode)) &&
                        aligned4(tied, 1) && aligned4(gw, sizeof(W)) && aligned4(gk, sizeof(P)) &&
                        aligned4(gd, sizeof(P));
    if (n > 0 && (gw || gk || gd)) {
      const int64_t blocks = (n + 4 * kThreads - 1) / (4 * kThreads);
      affine_reconstruct_bwd_kernel<W, P, Mode, Acc><<<static_cast<uint32_t>(blocks), kThreads, 0, stream>>>(
          g, m, static_cast<const P*>(refs.const_data_ptr()), tied, n, modes, vector, gw, gk, gd);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    if (modes > 0 && grad_refs.numel() > 0) sum_refs<W, P, Mode, Acc>(g, k_data, m, n, modes, vector);
  }

  template <class W, class P, class Mode, class Acc>
  void sum_refs(const W* g, const P* k_data, const Mode* m, int64_t n, int32_t modes, bool vector) const {
    const int64_t wave = (n + 4 * kSumThreads - 1) / (4 * kSumThreads);
    const int64_t most = std::min<int64_t>(kSumBlocks, kSumPartials / modes);
    const uint32_t blocks = static_cast<uint32_t>(std::max<int64_t>(1, std::min<int64_t>(most, wave)));
    const Tensor partial = torch::stable::new_empty(grad_refs, {static_cast<int64_t>(blocks) * modes});
    double* sums = static_cast<double*>(partial.mutable_data_ptr());
    const dim3 grid(blocks, static_cast<uint32_t>((modes + kModes - 1) / kModes));
    affine_reconstruct_refs_kernel<W, P, Mode, Acc>
        <<<grid, kSumThreads, 0, stream>>>(g, k_data, m, tied, n, modes, vector, sums);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    affine_reconstruct_sum_kernel<<<static_cast<uint32_t>((modes + 127) / 128), 128, 0, stream>>>(
        sums, static_cast<int32_t>(blocks), modes, static_cast<double*>(grad_refs.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <class W, class P, class Acc>
  void run_by_mode() const {
    switch (dtype_code(mode)) {
      case kUInt8: return run<W, P, uint8_t, Acc>();
      case kInt16: return run<W, P, int16_t, Acc>();
      default: return run<W, P, int32_t, Acc>();
    }
  }
};

// grad_w, grad_k, grad_d, grad_refs are written where they have elements; grad_refs is fp64.
void affine_reconstruct_bwd_out(Tensor grad, Tensor k, Tensor mode, Tensor refs, std::optional<Tensor> tied,
                                Tensor grad_w, Tensor grad_k, Tensor grad_d, Tensor grad_refs) {
  check_same_numel(grad, k);
  check_same_numel(grad, mode);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const uint8_t* mask = tied ? static_cast<const uint8_t*>(tied->const_data_ptr()) : nullptr;
  const Backward b{grad, k, mode, refs, mask, grad_w, grad_k, grad_d, grad_refs, current_stream(grad)};
  switch (types_code(grad, k)) {
    case kF32F32: return b.run_by_mode<float, float, float>();
    case kBF16F32: return b.run_by_mode<__nv_bfloat16, float, float>();
    case kBF16BF16: return b.run_by_mode<__nv_bfloat16, __nv_bfloat16, float>();
    case kF16F32: return b.run_by_mode<__half, float, float>();
    case kF16F16: return b.run_by_mode<__half, __half, float>();
    case kF64F64: return b.run_by_mode<double, double, double>();
  }
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cuda, m) { lic_fast::define_affine_reconstruct(m); }

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("affine_reconstruct_out", TORCH_BOX(&lic_fast::affine_reconstruct_out));
  m.impl("affine_reconstruct_", TORCH_BOX(&lic_fast::affine_reconstruct_));
  m.impl("affine_reconstruct_bwd_out", TORCH_BOX(&lic_fast::affine_reconstruct_bwd_out));
}
