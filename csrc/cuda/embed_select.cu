// The `count` smallest of values [n] where mask, ties by index, as selected [n] bool: radix selection on the device.
//
// Bits of a value become an unsigned key of the same order; what is not a candidate (NaN, mask False) gets the largest.
// For each digit (fp32: 11 + 11 + 10 bits, fp64 in six) a launch counts the keys that share the digits found so far and
// a block of its own finds the next digit of the threshold, the count-th smallest key. Counts are integers, added in
// any order: kTables tables a block in shared memory, by lane, and one addition for a warp that agrees, so that one hot
// bucket does not serialise. Then a pass marks what lies below and counts each block's ties, a block of its own adds
// those up, and blocks with ties to take mark the first of them in their order. fp32: 4 times 4 bytes (and 1 of mask)
// read and 1 written an element, and values once more where only some ties are taken. Memory: 16 KiB for each digit
// and 8 bytes for each kBlock elements. Nothing waits for the host.
#include <algorithm>
#include <array>

#include "cuda/device.cuh"

namespace lic_fast {
namespace {

constexpr int32_t kDigit = 11;
constexpr int32_t kBuckets = 1 << kDigit;
constexpr int32_t kTables = 4;
constexpr int32_t kThreads = 512;
constexpr int32_t kSearchThreads = 1024;
constexpr int64_t kBlock = int64_t{8} * kThreads;
constexpr int64_t kCountBlocks = 528;  // each adds its tables to the total once: four for each multiprocessor
constexpr uint32_t kWarp = 0xFFFFFFFFu;

struct Digit {
  int32_t shift;
  int32_t bits;
};
template <class Key>
constexpr std::array<Digit, 3> kDigits{{{21, 11}, {10, 11}, {0, 10}}};
template <>
constexpr std::array<Digit, 6> kDigits<uint64_t>{{{53, 11}, {42, 11}, {31, 11}, {20, 11}, {10, 10}, {0, 10}}};

struct State {
  uint64_t threshold;  // its digits found so far
  int64_t rank;        // of the threshold among the keys that share them
};

template <class Key>
struct Source {
  const Key* bits;
  const uint8_t* mask;  // null where every element is a candidate
  int64_t n;
};

template <class Key>
__device__ __forceinline__ Key key_at(const Source<Key>& source, int64_t i) {
  constexpr Key kSign = Key{1} << (8 * sizeof(Key) - 1);
  constexpr Key kInfinity = static_cast<Key>(sizeof(Key) == 4 ? 0x7F800000u : 0x7FF0000000000000u);
  const Key bits = source.bits[i];
  const Key magnitude = bits & ~kSign;
  Key key = (bits & kSign) ? ~bits : (bits | kSign);
  if (magnitude == 0) key = kSign;  // -0.0 is 0.0
  return magnitude > kInfinity || (source.mask && !source.mask[i]) ? ~Key{0} : key;
}

template <class Key>
__global__ void __launch_bounds__(kThreads)
    embed_select_count_kernel(const Source<Key> source, const State* state, Digit digit, bool filter,
                              unsigned long long* totals) {
  __shared__ uint32_t counts[kTables][kBuckets];
  for (int32_t b = threadIdx.x; b < kTables * kBuckets; b += kThreads) counts[b / kBuckets][b % kBuckets] = 0;
  __syncthreads();
  const Key prefix = filter ? static_cast<Key>(state->threshold) : Key{0};
  const int32_t above = filter ? digit.shift + digit.bits : 0;
  const int32_t lane = threadIdx.x % 32;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  // a warp stays together: its first lane decides
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i - lane < source.n; i += step) {
    const bool inside = i < source.n;
    const Key key = inside ? key_at(source, i) : Key{0};
    const bool counted = inside && (!filter || (key >> above) == prefix);
    const uint32_t who = __ballot_sync(kWarp, counted);
    if (who == 0) continue;
    const uint32_t bucket = static_cast<uint32_t>(key >> digit.shift) & ((1u << digit.bits) - 1);
    const int32_t leader = __ffs(who) - 1;
    const uint32_t common = __shfl_sync(kWarp, bucket, leader);
    if (__all_sync(kWarp, !counted || bucket == common)) {
      if (lane == leader) atomicAdd(&counts[lane % kTables][common], static_cast<uint32_t>(__popc(who)));
    } else if (counted) {
      atomicAdd(&counts[lane % kTables][bucket], 1u);
    }
  }
  __syncthreads();
  for (int32_t b = threadIdx.x; b < kBuckets; b += kThreads) {
    uint64_t sum = 0;
#pragma unroll
    for (int32_t table = 0; table < kTables; ++table) sum += counts[table][b];
    if (sum) atomicAdd(totals + b, static_cast<unsigned long long>(sum));
  }
}

// Inclusive sums over the block, the threads in order; `warps` holds a number for each warp.
__device__ __forceinline__ int64_t running_sum(int64_t value, int64_t* warps) {
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int32_t step = 1; step < 32; step *= 2) {
    const int64_t other = __shfl_up_sync(kWarp, value, step);
    if (lane >= step) value += other;
  }
  __syncthreads();  // the numbers of the call before have been read
  if (lane == 31) warps[warp] = value;
  __syncthreads();
  for (int32_t w = 0; w < warp; ++w) value += warps[w];
  return value;
}

// One block: the bucket that holds the rank-th key becomes the next digit.
__global__ void __launch_bounds__(kSearchThreads)
    embed_select_search_kernel(State* state, const unsigned long long* totals, int32_t bits, bool is_last,
                               uint64_t none) {
  __shared__ int64_t warps[32];
  const int64_t rank = state->rank;
  const uint64_t prefix = state->threshold;
  const int64_t first = static_cast<int64_t>(totals[2 * threadIdx.x]);
  const int64_t second = static_cast<int64_t>(totals[2 * threadIdx.x + 1]);
  const int64_t before = running_sum(first + second, warps) - first - second;
  __syncthreads();  // every thread has read the state
  for (int32_t j = 0; j < 2; ++j) {
    const int64_t below = j ? before + first : before, equal = j ? second : first;
    if (rank <= below || rank > below + equal) continue;  // true of one bucket only
    uint64_t threshold = (prefix << bits) | (2u * threadIdx.x + j);
    int64_t left = rank - below;
    if (is_last && threshold == none) {
      left = 0;  // fewer candidates than count: all of them lie below
    } else if (is_last && left == equal) {
      ++threshold;  // every tie is taken
      left = 0;
    }
    state->threshold = threshold;
    state->rank = left;
  }
}

template <class Key>
__global__ void __launch_bounds__(kThreads)
    embed_select_mark_kernel(const Source<Key> source, const State* state, uint8_t* selected, int64_t* ties) {
  __shared__ int32_t sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  const Key threshold = static_cast<Key>(state->threshold);
  const int64_t begin = int64_t{blockIdx.x} * kBlock;
  const int64_t end = begin + kBlock < source.n ? begin + kBlock : source.n;
  int32_t equal = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const Key key = key_at(source, i);
    selected[i] = key < threshold;
    equal += key == threshold;
  }
  for (int32_t step = 16; step > 0; step /= 2) equal += __shfl_xor_sync(kWarp, equal, step);
  if (threadIdx.x % 32 == 0 && equal) atomicAdd(&sum, equal);
  __syncthreads();
  if (threadIdx.x == 0) ties[blockIdx.x] = sum;
}

// One block: each block's ties become the ties before it.
__global__ void __launch_bounds__(kSearchThreads)
    embed_select_scan_kernel(const State* state, int64_t* ties, int64_t blocks) {
  __shared__ int64_t warps[32];
  __shared__ int64_t carried;
  if (state->rank == 0) return;
  int64_t carry = 0;
  for (int64_t begin = 0; begin < blocks; begin += kSearchThreads) {
    const int64_t b = begin + threadIdx.x;
    const int64_t own = b < blocks ? ties[b] : 0;
    const int64_t sum = running_sum(own, warps);
    if (b < blocks) ties[b] = carry + sum - own;
    if (threadIdx.x == kSearchThreads - 1) carried = sum;
    __syncthreads();
    carry += carried;
  }
}

template <class Key>
__global__ void __launch_bounds__(kThreads)
    embed_select_ties_kernel(const Source<Key> source, const State* state, uint8_t* selected, const int64_t* ties) {
  __shared__ int64_t warps[kThreads / 32];
  __shared__ int64_t found;
  const int64_t taken = state->rank;
  int64_t before = ties[blockIdx.x];
  if (before >= taken) return;  // true of every block where taken is 0
  const Key threshold = static_cast<Key>(state->threshold);
  const int64_t begin = int64_t{blockIdx.x} * kBlock;
  for (int64_t first = begin; first < begin + kBlock; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    const bool tie = i < source.n && key_at(source, i) == threshold;
    const int64_t sum = running_sum(tie, warps);
    if (tie && before + sum <= taken) selected[i] = 1;
    if (threadIdx.x == kThreads - 1) found = sum;
    __syncthreads();
    before += found;
  }
}

template <class Key>
void select_smallest(const Source<Key>& source, State* state, unsigned long long* totals, int64_t* ties,
                     uint8_t* selected, cudaStream_t stream) {
  const int64_t blocks = (source.n + kBlock - 1) / kBlock;
  const uint32_t count_blocks = static_cast<uint32_t>(std::min(blocks, kCountBlocks));
  for (const Digit digit : kDigits<Key>) {
    const bool filter = digit.shift + digit.bits < 8 * static_cast<int32_t>(sizeof(Key));
    embed_select_count_kernel<Key><<<count_blocks, kThreads, 0, stream>>>(source, state, digit, filter, totals);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    embed_select_search_kernel<<<1, kSearchThreads, 0, stream>>>(state, totals, digit.bits, digit.shift == 0,
                                                                 uint64_t{static_cast<Key>(~Key{0})});
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    totals += kBuckets;
  }
  embed_select_mark_kernel<Key><<<static_cast<uint32_t>(blocks), kThreads, 0, stream>>>(source, state, selected, ties);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  embed_select_scan_kernel<<<1, kSearchThreads, 0, stream>>>(state, ties, blocks);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  embed_select_ties_kernel<Key><<<static_cast<uint32_t>(blocks), kThreads, 0, stream>>>(source, state, selected, ties);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

__global__ void embed_select_start_kernel(State* state, int64_t count) { *state = State{0, count}; }

// values fp32 or fp64 [n], mask [n] or none, selected [n], all contiguous; 1 <= count <= n.
void embed_select_out(Tensor values, int64_t count, std::optional<Tensor> mask, Tensor selected) {
  const int64_t n = values.numel();
  check_same_numel(values, selected);
  if (mask) check_same_numel(values, *mask);
  STD_TORCH_CHECK(1 <= count && count <= n, "embed_select: count must be 1 to n");
  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  const cudaStream_t stream = current_stream(values);
  const bool narrow = values.scalar_type() == ScalarType::Float;
  const int64_t digits = narrow ? kDigits<uint32_t>.size() : kDigits<uint64_t>.size();
  Tensor totals = torch::stable::new_zeros(values, {digits * kBuckets}, ScalarType::Long);
  Tensor rest = torch::stable::new_empty(values, {2 + (n + kBlock - 1) / kBlock}, ScalarType::Long);
  State* state = static_cast<State*>(rest.mutable_data_ptr());
  int64_t* ties = static_cast<int64_t*>(rest.mutable_data_ptr()) + 2;
  embed_select_start_kernel<<<1, 1, 0, stream>>>(state, count);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  unsigned long long* sums = static_cast<unsigned long long*>(totals.mutable_data_ptr());
  const uint8_t* allowed = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
  uint8_t* out = static_cast<uint8_t*>(selected.mutable_data_ptr());
  if (narrow) {
    const Source<uint32_t> source{static_cast<const uint32_t*>(values.const_data_ptr()), allowed, n};
    select_smallest(source, state, sums, ties, out, stream);
  } else {
    const Source<uint64_t> source{static_cast<const uint64_t*>(values.const_data_ptr()), allowed, n};
    select_smallest(source, state, sums, ties, out, stream);
  }
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cuda, m) {
  m.def("embed_select_out(Tensor values, int count, Tensor? mask, Tensor(a!) selected) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("embed_select_out", TORCH_BOX(&lic_fast::embed_select_out));
}
