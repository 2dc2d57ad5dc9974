// Normalization over channels with a ReLU and a shift, and its gradients; lic_fast/reference/channel_norm.py is the
// formula. Tensors are contiguous: planes [B, C, S], or rows [B, S, C], as channels-last has them.
//
// The threads of one place share its channels: over planes a warp takes 32 places and every kWarps-th channel, and sums
// meet in shared memory; over rows a warp takes one place, and sums meet by shuffles. Neighbours in a warp are
// neighbours in memory either way. What a thread has read stays in its registers where kKept is not 0, so that x and
// the gradient are read once; of more channels they are read again, from the caches.
//
// Backward makes mean and deviation again from x. Its sums over places are made for a stretch of one image by one
// block, in the arithmetic's dtype, and a second launch adds the stretches in fp64: always in the same order.
#include "cuda/channel_norm.cuh"

namespace lic_fast {
namespace {

template <class T, class Acc, bool kLast, int32_t kKept>
__global__ void __launch_bounds__(kThreads) channel_norm_kernel(const __grid_constant__ Norm p) {
  __shared__ Acc room[kWarps][32];
  using Here = Tile<T, Acc, kLast, kKept>;
  const int64_t image = blockIdx.x / static_cast<uint32_t>(p.stretches), first = first_place(p);
  const Acc* weight = static_cast<const Acc*>(p.weight);
  const Acc* bias = static_cast<const Acc*>(p.bias);
  const Acc* shift = static_cast<const Acc*>(p.shift);
  T* y = static_cast<T*>(p.out);
  for (int64_t at = first; at < first + p.stretch && at < p.places; at += Here::kPlaces) {
    Here tile(p, image, at);
    tile.normalize(p, room);
    tile.each(p, [&](int32_t k, int32_t c) {
      const Acc before = add(multiply(tile.value(p, k, c), weight[c]), bias[c]);
      Acc result = p.relu && before < Acc(0) ? Acc(0) : before;  // NaN stays
      if (shift) result = add(result, shift[image * p.channels + c]);
      if (tile.inside) y[tile.place_of(p, c)] = convert<T>(result);
    });
  }
}

template <class T, class Acc, bool kLast, int32_t kKept>
__global__ void __launch_bounds__(kThreads) channel_norm_bwd_kernel(const __grid_constant__ Norm p) {
  __shared__ Acc room[kWarps][32];
  using Here = Tile<T, Acc, kLast, kKept>;
  const int64_t image = blockIdx.x / static_cast<uint32_t>(p.stretches), first = first_place(p);
  const Acc count = static_cast<Acc>(p.channels);
  const Acc* weight = static_cast<const Acc*>(p.weight);
  T* d_x = static_cast<T*>(p.out);
  Sums<Acc, kLast, kKept> sums(p);
  for (int64_t at = first; at < first + p.stretch && at < p.places; at += Here::kPlaces) {
    Here tile(p, image, at);
    tile.normalize(p, room);
    tile.read_gradient(p);
    Acc mean = Acc(0), along = Acc(0);
    tile.each(p, [&](int32_t k, int32_t c) {
      const Acc scaled = tile.kept(p, k, c) * weight[c];
      mean += scaled;
      along += scaled * tile.value(p, k, c);
    });
    mean = place_sum<kLast>(mean, room) / count;
    along = place_sum<kLast>(along, room) / count;
    tile.each(p, [&](int32_t k, int32_t c) {
      const Acc scaled = tile.kept(p, k, c) * weight[c];
      const Acc result = (scaled - mean - tile.value(p, k, c) * along) * tile.inverse;
      if (tile.inside) d_x[tile.place_of(p, c)] = convert<T>(result);
    });
    sums.add(p, tile, room, at == first);
  }
  sums.write(p, room);
}

// d_weight [C], d_bias [C] and d_shift [B, C] of the stretches' sums [B * stretches, 3, C]: a block 32 channels of one.
template <class Acc>
__global__ void __launch_bounds__(kThreads)
    channel_norm_sums_kernel(const __grid_constant__ Norm p, int64_t images, Acc* d_weight, Acc* d_bias, Acc* d_shift) {
  __shared__ double part[kWarps][32];
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t chunks = (p.channels + 31) / 32, what = blockIdx.x / chunks;
  const int64_t c = (blockIdx.x - what * chunks) * 32 + lane;
  const int32_t kind = what < 2 ? static_cast<int32_t>(what) : 2;
  const int64_t begin = what < 2 ? 0 : (what - 2) * p.stretches,
                end = what < 2 ? images * p.stretches : begin + p.stretches;
  double sum = 0;
  if (c < p.channels) {
    const Acc* from = static_cast<const Acc*>(p.sums) + kind * p.channels + c;
    for (int64_t row = begin + warp; row < end; row += kWarps) sum += static_cast<double>(from[row * 3 * p.channels]);
  }
  part[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || c >= p.channels) return;
  sum = 0;
  for (int32_t w = 0; w < kWarps; ++w) sum += part[w][lane];
  Acc* to = what == 0 ? d_weight : what == 1 ? d_bias : d_shift + (what - 2) * p.channels;
  to[c] = static_cast<Acc>(sum);
}

template <class T, class Acc, bool kLast, int32_t kKept, bool kBackward>
void launch(const Norm& p, int64_t blocks, cudaStream_t stream) {
  if constexpr (kBackward) {
    channel_norm_bwd_kernel<T, Acc, kLast, kKept><<<static_cast<uint32_t>(blocks), kThreads, 0, stream>>>(p);
  } else {
    channel_norm_kernel<T, Acc, kLast, kKept><<<static_cast<uint32_t>(blocks), kThreads, 0, stream>>>(p);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T, class Acc, bool kLast, bool kBackward>
void launch_by_channels(const Norm& p, int64_t blocks, cudaStream_t stream) {
  constexpr int32_t kStep = kLast ? 32 : kWarps, kFew = kLast ? 4 : 8;
  constexpr int32_t kMany = kLast ? (kBackward ? 12 : 16) : (kBackward ? 24 : 48);  // what registers hold
  if (p.channels <= kFew * kStep) return launch<T, Acc, kLast, kFew, kBackward>(p, blocks, stream);
  if constexpr (sizeof(Acc) == 4) {
    if (p.channels <= kMany * kStep) return launch<T, Acc, kLast, kMany, kBackward>(p, blocks, stream);
  }
  launch<T, Acc, kLast, 0, kBackward>(p, blocks, stream);
}

template <class T, class Acc, bool kLast>
void launch_by_direction(const Norm& p, int64_t blocks, cudaStream_t stream) {
  p.grad ? launch_by_channels<T, Acc, kLast, true>(p, blocks, stream)
         : launch_by_channels<T, Acc, kLast, false>(p, blocks, stream);
}

template <class T, class Acc>
void launch_by_layout(const Norm& p, bool planes, int64_t blocks, cudaStream_t stream) {
  planes ? launch_by_direction<T, Acc, false>(p, blocks, stream) : launch_by_direction<T, Acc, true>(p, blocks, stream);
}

void check(const Tensor& x, std::initializer_list<const Tensor*> alike_x, std::initializer_list<const Tensor*> others) {
  const int32_t code = dtype_code(x);
  STD_TORCH_CHECK(x.is_contiguous(), "lic_fast: channel_norm takes contiguous tensors");
  for (const Tensor* t : alike_x) {
    check_same_numel(x, *t);
    STD_TORCH_CHECK(t->is_contiguous() && dtype_code(*t) == code, "lic_fast: channel_norm takes tensors alike");
  }
  for (const Tensor* t : others) {
    STD_TORCH_CHECK(t->is_contiguous() && dtype_code(*t) == (code == kFloat64 ? kFloat64 : kFloat32),
                    "lic_fast: channel_norm takes parameters of the arithmetic's dtype");
  }
}

// Sizes of x, with stretches of 32 places and more, up to `longest`, where there are enough blocks.
Norm norm_of(const Tensor& x, bool planes, bool relu, double eps, int64_t longest) {
  Norm p{};
  p.x = x.const_data_ptr();
  const int64_t images = x.size(0), channels = x.size(planes ? 1 : x.dim() - 1);
  STD_TORCH_CHECK(channels <= INT32_MAX / 2, "lic_fast: channel_norm takes fewer channels, got ", channels);
  p.channels = static_cast<int32_t>(channels);
  p.places = images && channels ? x.numel() / (images * channels) : 0;
  const int64_t wanted = (images * p.places + kEnoughBlocks - 1) / kEnoughBlocks;
  p.stretch = std::min(longest, std::max<int64_t>(1, (wanted + 31) / 32) * 32);
  p.stretches = (p.places + p.stretch - 1) / p.stretch;
  STD_TORCH_CHECK(images * p.stretches <= INT32_MAX, "lic_fast: channel_norm takes fewer places, got ", p.places);
  p.eps = eps;
  p.relu = relu;
  return p;
}

void run(const Norm& p, const Tensor& x, bool planes, cudaStream_t stream) {
  const int64_t blocks = x.size(0) * p.stretches;
  if (blocks == 0) return;
  switch (dtype_code(x)) {
    case kFloat32: return launch_by_layout<float, float>(p, planes, blocks, stream);
    case kBFloat16: return launch_by_layout<__nv_bfloat16, float>(p, planes, blocks, stream);
    case kFloat16: return launch_by_layout<__half, float>(p, planes, blocks, stream);
    case kFloat64: return launch_by_layout<double, double>(p, planes, blocks, stream);
    default: STD_TORCH_CHECK(false, "lic_fast: channel_norm takes float32, bfloat16, float16 and float64");
  }
}

void channel_norm_out(Tensor x, Tensor weight, Tensor bias, Tensor shift, bool planes, bool relu, double eps,
                      Tensor y) {
  check(x, {&y}, {&weight, &bias, &shift});
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Norm p = norm_of(x, planes, relu, eps, 32);
  p.weight = weight.const_data_ptr();
  p.bias = bias.const_data_ptr();
  p.shift = shift.numel() ? shift.const_data_ptr() : nullptr;
  p.out = y.mutable_data_ptr();
  run(p, x, planes, current_stream(x));
}

void channel_norm_bwd_out(Tensor grad, Tensor x, Tensor weight, Tensor bias, bool planes, bool relu, double eps,
                          Tensor d_x, Tensor d_weight, Tensor d_bias, Tensor d_shift) {
  check(x, {&grad, &d_x}, {&weight, &bias, &d_weight, &d_bias, &d_shift});
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Norm p = norm_of(x, planes, relu, eps, kLongest);
  const int64_t images = x.size(0), rows = images * p.stretches;
  const Tensor sums = torch::stable::new_empty(weight, {std::max<int64_t>(1, rows * 3 * p.channels)});
  p.grad = grad.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.bias = bias.const_data_ptr();
  p.out = d_x.mutable_data_ptr();
  p.sums = sums.mutable_data_ptr();
  const cudaStream_t stream = current_stream(x);
  run(p, x, planes, stream);
  const int64_t blocks = (int64_t{p.channels} + 31) / 32 * (2 + images);  // without places the sums are zero
  STD_TORCH_CHECK(blocks <= INT32_MAX, "lic_fast: channel_norm takes fewer images, got ", images);
  if (blocks == 0) return;
  const auto finish = [&](auto zero) {
    using Acc = decltype(zero);
    channel_norm_sums_kernel<Acc><<<static_cast<uint32_t>(blocks), kThreads, 0, stream>>>(
        p, images, static_cast<Acc*>(d_weight.mutable_data_ptr()), static_cast<Acc*>(d_bias.mutable_data_ptr()),
        static_cast<Acc*>(d_shift.mutable_data_ptr()));
  };
  weight.element_size() == 8 ? finish(0.0) : finish(0.0f);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cuda, m) {
  m.def(
      "channel_norm_out(Tensor x, Tensor weight, Tensor bias, Tensor shift, bool planes, bool relu, float eps, "
      "Tensor(a!) y) -> ()");
  m.def(
      "channel_norm_bwd_out(Tensor grad, Tensor x, Tensor weight, Tensor bias, bool planes, bool relu, float eps, "
      "Tensor(a!) d_x, Tensor(b!) d_weight, Tensor(c!) d_bias, Tensor(d!) d_shift) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("channel_norm_out", TORCH_BOX(&lic_fast::channel_norm_out));
  m.impl("channel_norm_bwd_out", TORCH_BOX(&lic_fast::channel_norm_bwd_out));
}
