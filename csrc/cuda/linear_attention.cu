// Values summed over the places by the softmax of keys, and its gradients; lic_fast/reference/linear_attention.py is
// the formula. k is [B, K, N] and v [B, V, N], each with places or channels dense and the other axis any steps apart.
//
// Forward: a block has a tile of the context [V, K] and walks a piece of one image's places. Where a key exceeds what
// its channel has seen, what is summed so far shrinks, so that exp never overflows and k is read once. Maxima, sums and
// products of the pieces go to memory, and a second launch puts them together; a single piece ends with the result
// itself. Backward, with p = exp(k - most) / total: a block makes a tile of d_v = grad p, or of d_k = p (grad^T v -
// inner). Blocks of the same places are neighbours, so that k and v come from device memory once and from L2 after
// that. Arithmetic is in fp32 (fp64 for fp64), and its order depends on the shapes alone.
#include "cuda/linear_attention.cuh"

namespace lic_fast {
namespace {

constexpr int64_t kEnoughBlocks = 264;         // two for each multiprocessor of an H100: more pieces are not made
constexpr int64_t kPartialBytes = 64ll << 20;  // of all pieces' sums

// Blocks that registers leave room for on a multiprocessor.
template <class Acc>
constexpr int32_t kBlocks = sizeof(Acc) == 8 ? 1 : 2;

struct Attention {
  const void* k;
  const void* v;
  const void* grad;   // backward: of the arithmetic's dtype, like all that are neither k, v nor gradients of theirs
  const void* inner;  // backward
  void* statistics;   // [B, 2, K]: what was taken from exponents, and the sums of exp
  void* context;
  void* partial;  // [B * pieces, V + 2, K]: products, maxima, sums; null where there is one piece
  void* d_k;      // backward, dense
  void* d_v;
  int64_t images, keys, values, places, pieces, piece;  // piece: places of one
  Layout k_layout, v_layout, d_k_layout, d_v_layout;
  bool vector;  // rows [K] are aligned
};

// What a thread has of maxima and sums, where its tile is the one to write them; divisors: of the tile's columns.
template <class Keys, class Acc>
__device__ __forceinline__ void write_ends(const Attention& p, const Keys& keys, int64_t image, int64_t first_key,
                                           bool writes, Acc* rows, Acc* divisors) {
  const bool whole = p.partial == nullptr;
#pragma unroll
  for (int32_t c = 0; c < Keys::kColumns; ++c) {
    divisors[Keys::column(c)] = whole && p.places > 0 ? keys.total[c] : Acc(1);  // no places: zeros, not 0 / 0
    const int64_t key = first_key + Keys::column(c);
    if (!writes || key >= p.keys) continue;
    if (whole) {
      Acc* ends = static_cast<Acc*>(p.statistics) + image * 2 * p.keys + key;
      ends[0] = shift_of(keys.most[c]);
      ends[p.keys] = keys.total[c];
    } else {
      rows[p.values * p.keys + key] = keys.most[c];
      rows[(p.values + 1) * p.keys + key] = keys.total[c];
    }
  }
}

// A tile of an image's context over one piece of its places.
template <class T, class Acc, bool kLast>
__global__ void __launch_bounds__(kThreads, kBlocks<Acc>) context_kernel(const __grid_constant__ Attention p) {
  alignas(16) __shared__ Acc shares[kRows * kSide], values[kRows * kSide], scale[kSide];
  using Keys = Softmax<T, Acc, kLast>;
  int64_t block = blockIdx.x;
  const int64_t first_value = block % tiles(p.values) * kSide;
  block /= tiles(p.values);
  const int64_t first_key = block % tiles(p.keys) * kSide;
  block /= tiles(p.keys);
  const int64_t image = block / p.pieces, begin = block % p.pieces * p.piece;
  const int64_t end = begin + p.piece < p.places ? begin + p.piece : p.places;
  const View<T> k = view<T>(p.k, p.k_layout, image, p.keys, end), v = view<T>(p.v, p.v_layout, image, p.values, end);
  const int32_t x = threadIdx.x % 16, y = threadIdx.x / 16;
  Keys keys;
  Acc sum[4][4] = {};
  Four<T> next_k[2], next_v[2];
  fetch<Keys::kWay>(k, begin, first_key, next_k);
  fetch(!p.v_layout.last, v, begin, first_value, next_v);
  for (int64_t at = begin; at < end; at += kRows) {
    Acc share[2][4], shrink[Keys::kColumns], part[4][4];
    keys.add(next_k, at, end, share, shrink);
    __syncthreads();  // the stage before has been read
    put<Keys::kWay>(shares, share);
    put(!p.v_layout.last, values, next_v);
    if (Keys::writes()) {
#pragma unroll
      for (int32_t c = 0; c < Keys::kColumns; ++c) scale[Keys::column(c)] = shrink[c];
    }
    __syncthreads();
    fetch<Keys::kWay>(k, at + kRows, first_key, next_k);
    fetch(!p.v_layout.last, v, at + kRows, first_value, next_v);
    multiply_stage(values, shares, part);
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
#pragma unroll
      for (int32_t j = 0; j < 4; ++j) sum[i][j] = sum[i][j] * scale[4 * x + j] + part[i][j];
    }
  }
  keys.finish();
  __syncthreads();
  Acc* rows = p.partial ? static_cast<Acc*>(p.partial) + block * (p.values + 2) * p.keys
                        : static_cast<Acc*>(p.context) + image * p.values * p.keys;
  if (Keys::writes()) write_ends(p, keys, image, first_key, first_value == 0, rows, scale);
  __syncthreads();
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) {
    const int64_t value = first_value + 4 * y + i;
    if (value >= p.values) continue;
    Four<Acc> row;
#pragma unroll
    for (int32_t j = 0; j < 4; ++j) row.at[j] = sum[i][j] / scale[4 * x + j];
    store4(rows + value * p.keys, first_key + 4 * x, p.keys, p.vector, row);
  }
}

// 32 elements of a row of an image's context of its pieces; a warp takes every kWarps-th of them.
template <class Acc>
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ Attention p) {
  __shared__ Acc room[kWarps][32];
  const int64_t chunks = (p.keys + 31) / 32, row = blockIdx.x / chunks, image = row / p.values;
  const int32_t warp = threadIdx.x / 32;
  const int64_t key = (blockIdx.x - row * chunks) * 32 + threadIdx.x % 32, step = (p.values + 2) * p.keys;
  const bool inside = key < p.keys;
  const Acc* part = static_cast<const Acc*>(p.partial) + image * p.pieces * step + (inside ? key : 0);
  const Acc* most = part + p.values * p.keys;
  part += row % p.values * p.keys;
  Acc high = -static_cast<Acc>(INFINITY), total = Acc(0), sum = Acc(0);
#pragma unroll 8
  for (int64_t i = warp; i < p.pieces; i += kWarps) high = fmax(high, most[i * step]);
  high = of_warps<true>(high, room);
#pragma unroll 8
  for (int64_t i = warp; i < p.pieces; i += kWarps) {
    const Acc share = exp(most[i * step] - shift_of(high));
    total += share * most[i * step + p.keys];
    sum += share * part[i * step];
  }
  total = of_warps<false>(total, room);
  sum = of_warps<false>(sum, room);
  if (warp != 0 || !inside) return;
  static_cast<Acc*>(p.context)[row * p.keys + key] = sum / total;
  if (row % p.values == 0) {
    Acc* ends = static_cast<Acc*>(p.statistics) + image * 2 * p.keys + key;
    ends[0] = shift_of(high);
    ends[p.keys] = total;
  }
}

// Keys into shares, in the place of a stage: those of channels beyond the last one are zero.
template <Way kWay, class Acc>
__device__ __forceinline__ void share(const Acc* statistics, int64_t first, int64_t keys, Acc (&values)[2][4]) {
#pragma unroll
  for (int32_t e = 0; e < 2; ++e) {
#pragma unroll
    for (int32_t j = 0; j < 4; ++j) {
      const int64_t key = first + row_of<kWay>(e) + (kWay == kTurned ? j : 0);
      values[e][j] = key < keys ? exp(values[e][j] - statistics[key]) / statistics[keys + key] : Acc(0);
    }
  }
}

// sum[i][j] over all channels of what is multiplied with grad: shares of keys for d_v (kValues), else values for d_k.
template <class T, class Acc, bool kValues>
__device__ __forceinline__ void gradient_sum(const Attention& p, int64_t image, int64_t channel, int64_t place,
                                             const View<T>& from, bool turned, Acc* left, Acc* right,
                                             Acc (&sum)[4][4]) {
  const View<Acc> grad{static_cast<const Acc*>(p.grad) + image * p.values * p.keys, p.keys, p.keys, p.values, p.vector};
  const Acc* statistics = static_cast<const Acc*>(p.statistics) + image * 2 * p.keys;
  const int64_t end = kValues ? p.keys : p.values;
  Four<Acc> next_grad[2];
  Four<T> next[2];
  fetch(kValues, grad, 0, channel, next_grad);
  fetch(turned, from, 0, place, next);
  for (int64_t at = 0; at < end; at += kRows) {
    Acc values[2][4], part[4][4];
    widen(next, values);
    if constexpr (kValues) {
      turned ? share<kTurned>(statistics, at, p.keys, values) : share<kAcross>(statistics, at, p.keys, values);
    }
    __syncthreads();  // the stage before has been read
    put(kValues, left, next_grad);
    turned ? put<kTurned>(right, values) : put<kAcross>(right, values);
    __syncthreads();
    fetch(kValues, grad, at + kRows, channel, next_grad);
    fetch(turned, from, at + kRows, place, next);
    multiply_stage(left, right, part);
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
#pragma unroll
      for (int32_t j = 0; j < 4; ++j) sum[i][j] += part[i][j];
    }
  }
}

// Of each stretch of places first all tiles of d_v, then all of d_k.
template <class T, class Acc>
__global__ void __launch_bounds__(kThreads, kBlocks<Acc>) gradients_kernel(const __grid_constant__ Attention p) {
  alignas(16) __shared__ Acc left[kRows * kSide], right[kRows * kSide];
  const int64_t both = tiles(p.values) + tiles(p.keys), tile = blockIdx.x % both, stretch = blockIdx.x / both;
  const int64_t image = stretch / tiles(p.places), first = stretch % tiles(p.places) * kSide;
  const View<T> k = view<T>(p.k, p.k_layout, image, p.keys, p.places);
  const int32_t x = threadIdx.x % 16, y = threadIdx.x / 16;
  const int64_t place = first + 4 * x;
  Acc sum[4][4] = {};
  if (tile < tiles(p.values)) {
    const int64_t channel = tile * kSide;
    gradient_sum<T, Acc, true>(p, image, channel, first, k, p.k_layout.last, left, right, sum);
    store_tile<T>(p.d_v, p.d_v_layout, image, p.values, p.places, channel + 4 * y, place, sum);
    return;
  }
  const int64_t channel = (tile - tiles(p.values)) * kSide;
  const View<T> v = view<T>(p.v, p.v_layout, image, p.values, p.places);
  gradient_sum<T, Acc, false>(p, image, channel, first, v, p.v_layout.last, left, right, sum);
  const Acc* statistics = static_cast<const Acc*>(p.statistics) + image * 2 * p.keys;
  const Acc* inner = static_cast<const Acc*>(p.inner) + image * p.keys;
#pragma unroll
  for (int32_t j = 0; j < 4; ++j) {
    const bool last = p.k_layout.last;
    const int64_t key = channel + 4 * y, row = last ? place + j : key + j;
    const Four<T> four = last ? k.four(key, row) : k.four(place, row);
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      const int64_t own = last ? key + i : row;
      if (own >= p.keys) continue;
      const Acc factor = exp(convert<Acc>(four.at[i]) - statistics[own]) / statistics[p.keys + own];
      if (last) {
        sum[i][j] = factor * (sum[i][j] - inner[own]);
      } else {
        sum[j][i] = factor * (sum[j][i] - inner[own]);
      }
    }
  }
  store_tile<T>(p.d_k, p.d_k_layout, image, p.keys, p.places, channel + 4 * y, place, sum);
}

Layout layout_of(const Tensor& x, const char* name) {
  const bool last = x.stride(2) != 1;
  STD_TORCH_CHECK(!last || x.stride(1) == 1,
                  "lic_fast: linear_attention takes places or channels dense, got others in ", name);
  const int64_t dense = last ? 1 : 2;
  Layout layout{x.size(0) > 1 ? x.stride(0) : 0, x.size(3 - dense) > 1 ? x.stride(3 - dense) : 0, last, false};
  layout.vector = layout.batch % 4 == 0 && layout.step % 4 == 0 &&
                  aligned4(x.const_data_ptr(), static_cast<int64_t>(x.element_size()));
  return layout;
}

// matrix [B, V, K], rows [B, K], statistics [B, 2, K]
void check(const Tensor& k, const Tensor& v, const Tensor& matrix, const Tensor& statistics,
           std::initializer_list<const Tensor*> rows) {
  const int32_t code = dtype_code(k), wide = code == kFloat64 ? kFloat64 : kFloat32;
  STD_TORCH_CHECK(k.dim() == 3 && v.dim() == 3 && k.size(0) == v.size(0) && k.size(2) == v.size(2) && k.size(1) > 0 &&
                      v.size(1) > 0 && dtype_code(v) == code,
                  "lic_fast: linear_attention takes k [B, K, N] and v [B, V, N] of one dtype");
  const auto fits = [&](const Tensor& t, int64_t numel) {
    STD_TORCH_CHECK(t.is_contiguous() && dtype_code(t) == wide && t.numel() == numel,
                    "lic_fast: linear_attention takes contiguous tensors of the arithmetic's dtype beside k and v");
  };
  fits(matrix, k.size(0) * v.size(1) * k.size(1));
  fits(statistics, k.size(0) * 2 * k.size(1));
  for (const Tensor* t : rows) fits(*t, k.size(0) * k.size(1));
}

Attention attention_of(const Tensor& k, const Tensor& v, const Tensor& matrix) {
  Attention p{};
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.k_layout = layout_of(k, "k");
  p.v_layout = layout_of(v, "v");
  p.images = k.size(0), p.keys = k.size(1), p.values = v.size(1), p.places = k.size(2);
  p.pieces = 1, p.piece = p.places;
  p.vector = p.keys % 4 == 0 && aligned4(matrix.const_data_ptr(), static_cast<int64_t>(matrix.element_size()));
  return p;
}

uint32_t grid(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= INT32_MAX, "lic_fast: linear_attention takes smaller tensors, got ", blocks, " tiles");
  return static_cast<uint32_t>(blocks);
}

// Pieces of an image's places, enough to fill the GPU; their sums are at most a quarter of what is read, or one piece.
void cut(Attention& p, int64_t size) {
  const auto parts = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t fit = kPartialBytes / (size * p.images * (p.values + 2) * p.keys);
  const int64_t enough = parts(kEnoughBlocks, p.images * tiles(p.keys) * tiles(p.values));
  const int64_t least = parts(4 * p.keys * p.values, p.keys + p.values);
  const int64_t pieces = std::max<int64_t>(1, std::min({fit, enough, parts(p.places, least)}));
  p.piece = std::max<int64_t>(1, parts(parts(p.places, pieces), kRows)) * kRows;
  p.pieces = std::max<int64_t>(1, parts(p.places, p.piece));
}

template <class T, class Acc>
void run_forward(const Attention& p, cudaStream_t stream) {
  const uint32_t blocks = grid(p.images * p.pieces * tiles(p.keys) * tiles(p.values));
  if (p.k_layout.last) {
    context_kernel<T, Acc, true><<<blocks, kThreads, 0, stream>>>(p);
  } else {
    context_kernel<T, Acc, false><<<blocks, kThreads, 0, stream>>>(p);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (!p.partial) return;
  finish_kernel<Acc><<<grid(p.images * p.values * ((p.keys + 31) / 32)), kThreads, 0, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T, class Acc>
void run_backward(const Attention& p, cudaStream_t stream) {
  const uint32_t blocks = grid(p.images * tiles(p.places) * (tiles(p.keys) + tiles(p.values)));
  gradients_kernel<T, Acc><<<blocks, kThreads, 0, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T, class Acc>
void run(const Attention& p, cudaStream_t stream) {
  p.grad ? run_backward<T, Acc>(p, stream) : run_forward<T, Acc>(p, stream);
}

void run_by_dtype(const Attention& p, const Tensor& k) {
  const cudaStream_t stream = current_stream(k);
  switch (dtype_code(k)) {
    case kFloat32: return run<float, float>(p, stream);
    case kBFloat16: return run<__nv_bfloat16, float>(p, stream);
    case kFloat16: return run<__half, float>(p, stream);
    case kFloat64: return run<double, double>(p, stream);
    default: STD_TORCH_CHECK(false, "lic_fast: linear_attention takes float32, bfloat16, float16 and float64");
  }
}

void linear_attention_context_out(Tensor k, Tensor v, Tensor context, Tensor statistics) {
  check(k, v, context, statistics, {});
  const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
  Attention p = attention_of(k, v, context);
  if (p.images == 0) return;
  cut(p, static_cast<int64_t>(context.element_size()));
  const int64_t room = p.pieces > 1 ? p.images * p.pieces * (p.values + 2) * p.keys : 0;
  const Tensor partial = torch::stable::new_empty(context, {room});
  p.partial = room ? partial.mutable_data_ptr() : nullptr;
  p.context = context.mutable_data_ptr();
  p.statistics = statistics.mutable_data_ptr();
  run_by_dtype(p, k);
}

void linear_attention_context_bwd_out(Tensor grad, Tensor k, Tensor v, Tensor inner, Tensor statistics, Tensor d_k,
                                      Tensor d_v) {
  check(k, v, grad, statistics, {&inner});
  for (const auto& [x, d] : {std::pair(&k, &d_k), std::pair(&v, &d_v)}) {
    STD_TORCH_CHECK(d->dim() == 3 && std::equal(d->sizes().begin(), d->sizes().end(), x->sizes().begin()) &&
                        dtype_code(*d) == dtype_code(k) && is_dense(*d),
                    "lic_fast: linear_attention takes dense gradients of the shapes and the dtype of k and v");
  }
  const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
  Attention p = attention_of(k, v, grad);
  if (p.images == 0 || p.places == 0) return;
  p.grad = grad.const_data_ptr();
  p.inner = inner.const_data_ptr();
  p.statistics = const_cast<void*>(statistics.const_data_ptr());  // only read
  p.d_k = d_k.mutable_data_ptr();
  p.d_v = d_v.mutable_data_ptr();
  p.d_k_layout = layout_of(d_k, "d_k");
  p.d_v_layout = layout_of(d_v, "d_v");
  run_by_dtype(p, k);
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cuda, m) {
  m.def("linear_attention_context_out(Tensor k, Tensor v, Tensor(a!) context, Tensor(b!) statistics) -> ()");
  m.def(
      "linear_attention_context_bwd_out(Tensor grad, Tensor k, Tensor v, Tensor inner, Tensor statistics, "
      "Tensor(a!) d_k, Tensor(b!) d_v) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("linear_attention_context_out", TORCH_BOX(&lic_fast::linear_attention_context_out));
  m.impl("linear_attention_context_bwd_out", TORCH_BOX(&lic_fast::linear_attention_context_bwd_out));
}
