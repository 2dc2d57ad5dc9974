// Normalization over channels with a ReLU and a shift, and its gradients; lic_fast/reference/channel_norm.py is the
// formula. Tensors are contiguous: rows [B, places, C], as channels-last has them, or planes [B, C, places].
//
// A stretch of kStretch places of one image is the unit of work; channel_norm_loops.h has its loops. Forward reads x
// and writes y once. Backward makes mean and deviation again from x, which is cheaper than to keep them; the sums over
// places are made for stretches and added in their order, so that they do not depend on the number of threads.
#include <memory>

#include "cpu/channel_norm_loops.h"
#include "cpu/parallel.h"

namespace lic_fast {
namespace {

constexpr int64_t kStretch = 256;

template <class Isa>
LIC_FAST_INLINE void run_part_body(const Norm& p, void* room) {
  switch (p.dtype) {
    case kFloat32: return run_stretch<float, float>(p, room);
    case kBFloat16: return run_stretch<BFloat16, float>(p, room);
    default: return run_stretch<double, double>(p, room);
  }
}

LIC_FAST_SIMD_VARIANTS(run_part, (const Norm& p, void* room), (p, room));

struct Shape {
  int64_t images, places, channels, stretches;  // stretches of an image's places
  bool planes;

  // Elements before place `first` of an image.
  int64_t at(int64_t image, int64_t first) const {
    return planes ? image * channels * places + first : (image * places + first) * channels;
  }
};

Shape shape_of(const Tensor& x, bool planes) {
  const int64_t B = x.size(0), C = x.size(planes ? 1 : x.dim() - 1), places = B && C ? x.numel() / (B * C) : 0;
  return {B, places, C, (places + kStretch - 1) / kStretch, planes};
}

void check(const Tensor& x, std::initializer_list<const Tensor*> alike_x, std::initializer_list<const Tensor*> others) {
  const int32_t code = dtype_code(x);
  STD_TORCH_CHECK(code == kFloat32 || code == kBFloat16 || code == kFloat64,
                  "lic_fast: channel_norm takes float32, bfloat16 and float64");
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

// Calls body(image, first place, places, room) for all stretches; room: as room_of says, zero.
template <class Body>
void over_stretches(const Shape& s, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kSerialElements / (kStretch * std::max<int64_t>(1, s.channels)));
  torch::stable::parallel_for(0, s.images * s.stretches, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<double[]> room(new double[room_of(s.channels, s.planes)]());
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t % s.stretches * kStretch;
      body(t, t / s.stretches, first, std::min(kStretch, s.places - first), room.get());
    }
  });
}

void channel_norm_out(Tensor x, Tensor weight, Tensor bias, Tensor shift, bool planes, bool relu, double eps,
                      Tensor y) {
  check(x, {&y}, {&weight, &bias, &shift});
  const Shape s = shape_of(x, planes);
  const int64_t size = x.element_size(), wide = weight.element_size();
  const Norm whole{x.const_data_ptr(),
                   nullptr,
                   weight.const_data_ptr(),
                   bias.const_data_ptr(),
                   nullptr,
                   y.mutable_data_ptr(),
                   nullptr,
                   0,
                   s.channels,
                   planes ? s.places : 0,
                   eps,
                   relu,
                   dtype_code(x)};
  const void* shifts = shift.numel() ? shift.const_data_ptr() : nullptr;
  over_stretches(s, [&](int64_t, int64_t image, int64_t first, int64_t rows, void* room) {
    Norm part = whole;
    const int64_t at = s.at(image, first);
    part.x = advance(whole.x, at, size);
    part.out = advance(whole.out, at, size);
    part.shift = advance(shifts, image * s.channels, wide);
    part.rows = rows;
    run_part(part, room);
  });
}

// d_weight, d_bias [C] and d_shift [B, C] of the stretches' sums [B * stretches, 3, C], in their order.
template <class Acc>
void add_up(const Shape& s, const Acc* sums, Acc* d_weight, Acc* d_bias, Acc* d_shift) {
  const int64_t C = s.channels;
  std::fill_n(d_weight, C, Acc(0));
  std::fill_n(d_bias, C, Acc(0));
  std::fill_n(d_shift, s.images * C, Acc(0));
  for (int64_t t = 0; t < s.images * s.stretches; ++t) {
    const Acc* part = sums + t * 3 * C;
    Acc* shift = d_shift + t / s.stretches * C;
    for (int64_t c = 0; c < C; ++c) {
      d_weight[c] += part[c];
      d_bias[c] += part[C + c];
      shift[c] += part[2 * C + c];
    }
  }
}

void channel_norm_bwd_out(Tensor grad, Tensor x, Tensor weight, Tensor bias, bool planes, bool relu, double eps,
                          Tensor d_x, Tensor d_weight, Tensor d_bias, Tensor d_shift) {
  check(x, {&grad, &d_x}, {&weight, &bias, &d_weight, &d_bias, &d_shift});
  const Shape s = shape_of(x, planes);
  const int64_t size = x.element_size(), wide = weight.element_size();
  const std::unique_ptr<double[]> sums(new double[std::max<int64_t>(1, s.images * s.stretches * 3 * s.channels)]);
  const Norm whole{x.const_data_ptr(),
                   grad.const_data_ptr(),
                   weight.const_data_ptr(),
                   bias.const_data_ptr(),
                   nullptr,
                   d_x.mutable_data_ptr(),
                   nullptr,
                   0,
                   s.channels,
                   planes ? s.places : 0,
                   eps,
                   relu,
                   dtype_code(x)};
  over_stretches(s, [&](int64_t t, int64_t image, int64_t first, int64_t rows, void* room) {
    Norm part = whole;
    const int64_t at = s.at(image, first);
    part.x = advance(whole.x, at, size);
    part.grad = advance(whole.grad, at, size);
    part.out = advance(whole.out, at, size);
    part.sums = advance(static_cast<void*>(sums.get()), t * 3 * s.channels, wide);
    part.rows = rows;
    run_part(part, room);
  });
  const auto finish = [&](auto zero) {
    using Acc = decltype(zero);
    add_up(s, reinterpret_cast<const Acc*>(sums.get()), static_cast<Acc*>(d_weight.mutable_data_ptr()),
           static_cast<Acc*>(d_bias.mutable_data_ptr()), static_cast<Acc*>(d_shift.mutable_data_ptr()));
  };
  wide == 8 ? finish(0.0) : finish(0.0f);
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cpp, m) {
  m.def(
      "channel_norm_out(Tensor x, Tensor weight, Tensor bias, Tensor shift, bool planes, bool relu, float eps, "
      "Tensor(a!) y) -> ()");
  m.def(
      "channel_norm_bwd_out(Tensor grad, Tensor x, Tensor weight, Tensor bias, bool planes, bool relu, float eps, "
      "Tensor(a!) d_x, "
      "Tensor(b!) d_weight, Tensor(c!) d_bias, Tensor(d!) d_shift) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("channel_norm_out", TORCH_BOX(&lic_fast::channel_norm_out));
  m.impl("channel_norm_bwd_out", TORCH_BOX(&lic_fast::channel_norm_bwd_out));
}
