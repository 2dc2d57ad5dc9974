// A step of recursive least squares of w ~ k r + d for the free embeddable elements of a partly embedded model:
//     e = (w - k r) - d;  k <- k + e g0;  d <- d + e g1;  change = |e| norm
// with r, g0, g1 and norm of the element's mode; one launch for the whole list. Reads w (4 bytes) and code (1), k and d
// (8) of embeddable elements, writes k and d back (8) where they move, and change (4): 25 bytes an element in fp32. A
// block of threads takes 1024 places, kRounds for each thread; k and d hold only embeddable elements, so it ranks its
// own by ballots and finds their first in `base`. Ranks follow places: neighbours in a warp read neighbours in every
// tensor, one element each, since no vector of k would be aligned. The gains, at most 2 KB, lie in shared memory. Takes
// w fp32, bf16 or fp16 with k, d, change fp32, and fp64 throughout. Arithmetic is unfused, in fp64.
#include "common/list.h"
#include "cuda/device.cuh"

namespace lic_fast {
namespace {

constexpr int32_t kPlaces = 1024;  // of a block
constexpr int32_t kThreads = 256;
constexpr int32_t kWarps = kThreads / 32;
constexpr int32_t kRounds = kPlaces / kThreads;
constexpr int32_t kCounts = kRounds * kWarps;
constexpr int64_t kColumns = 4;  // r, g0, g1, norm
constexpr uint8_t kTied = 0x80, kStateless = 0x40, kOutside = 0x3F;
static_assert(kCounts == 32, "one warp ranks the counts of all");

struct Entry {
  const void* w;
  int64_t n;
  int64_t block;  // the tensor's first one in the flat tensors
};

struct Embedding {
  const uint8_t* code;
  const int64_t* base;
  void* k;
  void* d;
  void* change;  // or null
  const double* gains;
  int32_t modes;
};

// before[j]: embeddable places of the block before place j * kThreads + threadIdx.x
__device__ __forceinline__ void rank(const uint8_t (&code)[kRounds], int32_t (&before)[kRounds]) {
  __shared__ int32_t counts[kCounts];
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int32_t j = 0; j < kRounds; ++j) {
    const uint32_t found = __ballot_sync(0xFFFFFFFFu, (code[j] & kOutside) != kOutside);
    before[j] = __popc(found & ((1u << lane) - 1));
    if (lane == 0) counts[j * kWarps + warp] = __popc(found);
  }
  __syncthreads();
  if (warp == 0) {
    const int32_t own = counts[lane];
    int32_t sum = own;
#pragma unroll
    for (int32_t step = 1; step < 32; step *= 2) {
      const int32_t left = __shfl_up_sync(0xFFFFFFFFu, sum, step);
      if (lane >= step) sum += left;
    }
    counts[lane] = sum - own;
  }
  __syncthreads();
#pragma unroll
  for (int32_t j = 0; j < kRounds; ++j) before[j] += counts[j * kWarps + warp];
}

template <class W, class K>
__device__ __forceinline__ void update(const Entry& e, const Embedding& x, int64_t block_of_tensor,
                                       const double* gains) {
  const int64_t first = block_of_tensor * kPlaces, place = (e.block + block_of_tensor) * kPlaces;
  const double nan = __longlong_as_double(0x7FF8000000000000LL), inf = __longlong_as_double(0x7FF0000000000000LL);
  uint8_t code[kRounds];
  int32_t before[kRounds];
#pragma unroll
  for (int32_t j = 0; j < kRounds; ++j) {
    const int32_t i = j * kThreads + threadIdx.x;
    code[j] = first + i < e.n ? x.code[place + i] : static_cast<uint8_t>(kStateless | kOutside);
  }
  rank(code, before);  // its barriers also stand between the writes of gains and what reads them
  const int64_t slot = x.base[2 * (e.block + block_of_tensor) + 1];
  K* k = static_cast<K*>(x.k) + slot;
  K* d = static_cast<K*>(x.d) + slot;
  const W* w = static_cast<const W*>(e.w) + first;
  K old_k[kRounds], old_d[kRounds];
  W value[kRounds];
  bool moves[kRounds];
#pragma unroll
  for (int32_t j = 0; j < kRounds; ++j) {
    moves[j] = (code[j] & kOutside) != kOutside && code[j] < kStateless;
    old_k[j] = moves[j] ? k[before[j]] : K(0);
    old_d[j] = moves[j] ? d[before[j]] : K(0);
    value[j] = moves[j] ? w[j * kThreads + threadIdx.x] : W(0.0f);
  }
#pragma unroll
  for (int32_t j = 0; j < kRounds; ++j) {
    const int32_t mode = code[j] & kOutside;
    const bool waits = mode != kOutside && (code[j] & (kTied | kStateless)) == kTied;
    double distance = waits ? inf : nan;
    if (moves[j]) {
      const double* row = gains + mode;
      const double wide_k = convert<double>(old_k[j]), wide_d = convert<double>(old_d[j]);
      const double explained = multiply(wide_k, row[0]);
      const double error = add(add(convert<double>(value[j]), -explained), -wide_d);
      k[before[j]] = convert<K>(add(wide_k, multiply(error, row[(kOutside + 1)])));
      d[before[j]] = convert<K>(add(wide_d, multiply(error, row[2 * (kOutside + 1)])));
      distance = multiply(fabs(error), row[3 * (kOutside + 1)]);
    }
    if (x.change) static_cast<K*>(x.change)[place + j * kThreads + threadIdx.x] = convert<K>(distance);
  }
}

template <class W, class K>
__global__ void __launch_bounds__(kThreads)
    rls_update_kernel(const __grid_constant__ ListTable<Entry> table, const Embedding x) {
  __shared__ double gains[kColumns * (kOutside + 1)];  // by column; NaN beyond the last mode
  const int32_t mode = threadIdx.x / kColumns, column = threadIdx.x % kColumns;
  gains[column * (kOutside + 1) + mode] =
      mode < x.modes ? x.gains[threadIdx.x] : __longlong_as_double(0x7FF8000000000000LL);
  const int32_t index = table.entry_of(blockIdx.x);
  update<W, K>(table.entries[index], x, static_cast<int32_t>(blockIdx.x) - table.first_block[index], gains);
}
static_assert(kColumns * (kOutside + 1) == kThreads, "a thread loads one of the gains");

void launch(ListTable<Entry>& table, const Embedding& x, int32_t type, cudaStream_t stream) {
  if (table.blocks > 0) {
    switch (type) {
      case kFloat32: rls_update_kernel<float, float><<<table.blocks, kThreads, 0, stream>>>(table, x); break;
      case kBFloat16: rls_update_kernel<__nv_bfloat16, float><<<table.blocks, kThreads, 0, stream>>>(table, x); break;
      case kFloat16: rls_update_kernel<__half, float><<<table.blocks, kThreads, 0, stream>>>(table, x); break;
      default: rls_update_kernel<double, double><<<table.blocks, kThreads, 0, stream>>>(table, x);
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  table.count = table.blocks = 0;
}

bool is_flat(const Tensor& tensor, const Tensor& like, ScalarType type, int64_t elements) {
  return tensor.is_cuda() && tensor.get_device_index() == like.get_device_index() && tensor.scalar_type() == type &&
         tensor.is_contiguous() && tensor.numel() == elements;
}

// Returns false, having launched nothing, where the tensors are not what the kernel can walk.
bool rls_update_(std::vector<Tensor> params, Tensor code, Tensor base, Tensor k, Tensor d, Tensor gains,
                 std::optional<Tensor> change) {
  if (params.empty()) return false;
  const Tensor& like = params[0];
  const int32_t type = dtype_code(like);
  if (type != kFloat32 && type != kBFloat16 && type != kFloat16 && type != kFloat64) return false;
  const ScalarType wide = type == kFloat64 ? ScalarType::Double : ScalarType::Float;
  int64_t blocks = 0;
  for (const Tensor& p : params) {
    if (!p.is_cuda() || p.get_device_index() != like.get_device_index()) return false;
    if (dtype_code(p) != type || !is_dense(p)) return false;
    blocks += (p.numel() + kPlaces - 1) / kPlaces;
  }
  if (!is_flat(code, like, ScalarType::Byte, blocks * kPlaces)) return false;
  if (!is_flat(base, like, ScalarType::Long, 2 * blocks)) return false;
  if (!is_flat(k, like, wide, d.numel()) || !is_flat(d, like, wide, k.numel())) return false;
  if (gains.dim() != 2 || gains.size(0) > kOutside) return false;
  if (!is_flat(gains, like, ScalarType::Double, kColumns * gains.size(0))) return false;
  if (change && !is_flat(*change, like, wide, blocks * kPlaces)) return false;

  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const cudaStream_t stream = current_stream(like);
  const Embedding x{static_cast<const uint8_t*>(code.const_data_ptr()),
                    static_cast<const int64_t*>(base.const_data_ptr()),
                    k.mutable_data_ptr(),
                    d.mutable_data_ptr(),
                    change ? change->mutable_data_ptr() : nullptr,
                    static_cast<const double*>(gains.const_data_ptr()),
                    static_cast<int32_t>(gains.size(0))};
  ListTable<Entry> table;
  int64_t block = 0;
  for (const Tensor& p : params) {
    const int64_t own = (p.numel() + kPlaces - 1) / kPlaces;
    if (own == 0) continue;
    if (table.full()) launch(table, x, type, stream);
    table.add({p.const_data_ptr(), p.numel(), block}, static_cast<int32_t>(own));
    block += own;
  }
  launch(table, x, type, stream);
  return true;
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cuda, m) {
  m.def(
      "rls_update_(Tensor[] params, Tensor code, Tensor base, Tensor(a!) k, Tensor(b!) d, Tensor gains,"
      " Tensor(c!)? change) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("rls_update_", TORCH_BOX(&lic_fast::rls_update_));
}
