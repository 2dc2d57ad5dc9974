// Assignment of every weight to the mode whose reference's trajectory it correlates with most, and its affine fit.
//
// A thread takes two elements through all T snapshots; fp64 sums of kModes modes at a time stay in registers, the
// directions of those modes pass through shared memory kEpochs at a time. Up to 16 modes read the snapshots once, 2 T
// bytes an element in bf16, in pairs where every row is aligned, and write 13 (fp64 snapshots: 25); more modes read
// them again. Sums are in the order of t, products and sums unfused: the same bits as in every other backend. No memory
// beyond the outputs. Takes snapshots bf16, fp16, fp32, fp64.
#include "cuda/device.cuh"

namespace lic_fast {
namespace {

constexpr int32_t kThreads = 128;
constexpr int32_t kElements = 2;  // of a thread, adjacent
constexpr int32_t kEpochs = 64;   // of the directions in shared memory
constexpr int64_t kBlockElements = int64_t{kThreads} * kElements;

struct Job {
  const void* snapshots;
  int64_t n;
  int64_t row;  // elements from one snapshot to the next
  int32_t epochs;
  int32_t modes;
  const double* directions;  // [modes, epochs]
  const double* mean;
  const double* norm;
  uint8_t* mode;
  void* k;
  void* d;
  void* correlation;
  bool pairs;  // every row can be read two elements at a time
};

template <class X>
struct alignas(sizeof(X) * kElements) Pair {
  X at[kElements];
};

template <class X>
__device__ __forceinline__ void load_pair(const Job& job, int32_t t, int64_t i, double (&out)[kElements]) {
  const X* x = static_cast<const X*>(job.snapshots) + t * job.row + i;
  if (job.pairs && i + kElements <= job.n) {
    const Pair<X> both = *reinterpret_cast<const Pair<X>*>(x);
#pragma unroll
    for (int32_t e = 0; e < kElements; ++e) out[e] = convert<double>(both.at[e]);
  } else {
#pragma unroll
    for (int32_t e = 0; e < kElements; ++e) out[e] = i + e < job.n ? convert<double>(x[e]) : 0.0;
  }
}

struct Best {  // of an element: the sum of largest size, its mode, and the sums of y and y^2
  double num = 0.0;
  int32_t mode = 0;
  double total = 0.0;
  double squares = 0.0;
};

// Every thread of the block comes here, for the sake of the shared directions.
template <class X, int32_t kModes>
__device__ __forceinline__ void correlate(const Job& job, int64_t i, int32_t begin, const double (&first)[kElements],
                                          double (&directions)[kEpochs][kModes], Best (&best)[kElements]) {
  double num[kElements][kModes] = {};
  double total[kElements] = {}, squares[kElements] = {};
  for (int32_t t0 = 1; t0 < job.epochs; t0 += kEpochs) {
    const int32_t epochs = min(kEpochs, job.epochs - t0);
    __syncthreads();
    for (int32_t place = threadIdx.x; place < epochs * kModes; place += kThreads) {
      const int32_t t = place / kModes, m = begin + place % kModes;
      directions[t][place % kModes] = m < job.modes ? job.directions[int64_t{m} * job.epochs + t0 + t] : 0.0;
    }
    __syncthreads();
    for (int32_t t = 0; t < epochs; ++t) {
      double y[kElements];
      load_pair<X>(job, t0 + t, i, y);
#pragma unroll
      for (int32_t e = 0; e < kElements; ++e) {
        y[e] = add(y[e], -first[e]);
        total[e] = add(total[e], y[e]);
        squares[e] = add(squares[e], multiply(y[e], y[e]));
#pragma unroll
        for (int32_t m = 0; m < kModes; ++m) num[e][m] = add(num[e][m], multiply(y[e], directions[t][m]));
      }
    }
  }
#pragma unroll
  for (int32_t e = 0; e < kElements; ++e) {
    best[e].total = total[e];
    best[e].squares = squares[e];
#pragma unroll
    for (int32_t m = 0; m < kModes; ++m) {  // a mode behind the last has the sum 0, which is never larger
      if (fabs(num[e][m]) > fabs(best[e].num)) {
        best[e].num = num[e][m];
        best[e].mode = begin + m;
      }
    }
  }
}

template <class X, class Out, int32_t kModes>
__global__ void __launch_bounds__(kThreads) cmd_assign_kernel(const Job job) {
  __shared__ double directions[kEpochs][kModes];
  const int64_t i = int64_t{blockIdx.x} * kBlockElements + int64_t{threadIdx.x} * kElements;
  double first[kElements];
  load_pair<X>(job, 0, i, first);
  Best best[kElements];
  for (int32_t begin = 0; begin < job.modes; begin += kModes) {
    correlate<X, kModes>(job, i, begin, first, directions, best);
  }
  const double epochs = static_cast<double>(job.epochs);
#pragma unroll
  for (int32_t e = 0; e < kElements; ++e) {
    if (i + e >= job.n) return;
    const Best& b = best[e];
    const double spread = add(b.squares, -__ddiv_rn(multiply(b.total, b.total), epochs));
    const bool finite = b.squares < __longlong_as_double(0x7FF0000000000000);  // false for NaN too
    const bool moves = finite && spread > 0.0;
    const double num = moves ? b.num : 0.0;
    const int32_t mode = moves ? b.mode : 0;
    const double norm = job.norm[mode];
    const double slope = norm > 0.0 ? __ddiv_rn(num, norm) : 0.0;
    const double level = add(first[e], __ddiv_rn(b.total, epochs));
    double shift = add(level, -multiply(slope, job.mean[mode]));
    if (!finite) {
      shift = convert<double>(static_cast<const X*>(job.snapshots)[(job.epochs - 1) * job.row + i + e]);
    }
    const double correlation = moves ? fmin(__ddiv_rn(fabs(num), __dsqrt_rn(spread)), 1.0) : 0.0;
    job.mode[i + e] = static_cast<uint8_t>(mode);
    static_cast<Out*>(job.k)[i + e] = static_cast<Out>(slope);
    static_cast<Out*>(job.d)[i + e] = static_cast<Out>(shift);
    static_cast<Out*>(job.correlation)[i + e] = static_cast<Out>(correlation);
  }
}

template <class X, class Out>
void launch(const Job& job, cudaStream_t stream) {
  const uint32_t blocks = static_cast<uint32_t>((job.n + kBlockElements - 1) / kBlockElements);
  const int32_t groups = (job.modes + 15) / 16;
  const int32_t modes = (job.modes + groups - 1) / groups;  // of a group, shared evenly
  if (modes <= 4) {
    cmd_assign_kernel<X, Out, 4><<<blocks, kThreads, 0, stream>>>(job);
  } else if (modes <= 8) {
    cmd_assign_kernel<X, Out, 8><<<blocks, kThreads, 0, stream>>>(job);
  } else if (modes <= 12) {
    cmd_assign_kernel<X, Out, 12><<<blocks, kThreads, 0, stream>>>(job);
  } else {
    cmd_assign_kernel<X, Out, 16><<<blocks, kThreads, 0, stream>>>(job);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// snapshots [T, n] with adjacent elements; directions [M, T], mean and norm [M] fp64; all outputs [n].
void cmd_assign_out(Tensor snapshots, Tensor directions, Tensor mean, Tensor norm, Tensor mode, Tensor k, Tensor d,
                    Tensor correlation) {
  const int64_t n = snapshots.size(1);
  for (const Tensor* t : {&mode, &k, &d, &correlation}) {
    STD_TORCH_CHECK(t->numel() == n && t->is_contiguous(), "cmd_assign: an output of another size than snapshots");
  }
  const int64_t modes = directions.size(0);
  STD_TORCH_CHECK(1 <= modes && modes <= 256 && directions.size(1) == snapshots.size(0) && mean.numel() == modes &&
                      norm.numel() == modes,
                  "cmd_assign: refs must be [M, T] with 1 <= M <= 256 for snapshots [T, n]");
  if (n == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(snapshots.get_device_index());
  const int64_t pair_bytes = kElements * static_cast<int64_t>(snapshots.element_size());
  const uintptr_t address = reinterpret_cast<uintptr_t>(snapshots.const_data_ptr());
  const Job job{snapshots.const_data_ptr(),
                n,
                snapshots.stride(0),
                static_cast<int32_t>(snapshots.size(0)),
                static_cast<int32_t>(modes),
                static_cast<const double*>(directions.const_data_ptr()),
                static_cast<const double*>(mean.const_data_ptr()),
                static_cast<const double*>(norm.const_data_ptr()),
                static_cast<uint8_t*>(mode.mutable_data_ptr()),
                k.mutable_data_ptr(),
                d.mutable_data_ptr(),
                correlation.mutable_data_ptr(),
                address % pair_bytes == 0 && snapshots.stride(0) % kElements == 0};
  const cudaStream_t stream = current_stream(snapshots);
  switch (dtype_code(snapshots)) {
    case kFloat32: return launch<float, float>(job, stream);
    case kBFloat16: return launch<__nv_bfloat16, float>(job, stream);
    case kFloat16: return launch<__half, float>(job, stream);
    case kFloat64: return launch<double, double>(job, stream);
    default: STD_TORCH_CHECK(false, "cmd_assign: a dtype of snapshots that the CUDA kernel does not read");
  }
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cuda, m) {
  m.def(
      "cmd_assign_out(Tensor snapshots, Tensor directions, Tensor mean, Tensor norm, Tensor(a!) mode, Tensor(b!) k, "
      "Tensor(c!) d, Tensor(d!) correlation) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("cmd_assign_out", TORCH_BOX(&lic_fast::cmd_assign_out));
}
