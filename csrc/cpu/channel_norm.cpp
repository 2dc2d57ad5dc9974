// Normalization over channels with a ReLU and a shift, and its gradients; lic_fast/reference/channel_norm.py is the
// formula. Tensors are rows [B, places, C], contiguous: the channels of a place lie side by side.
//
// A row is widened into a buffer of fp32 (fp64 for fp64) once, in the first-level cache; its sums go over
// 32 (16) independent ones, so that the order is the same in every variant. Forward
// reads x and writes y once. Backward makes mean and deviation again from x, which is cheaper than to keep them; the
// sums over places are made for stretches of kStretch places of one image and added in their order, so that they do
// not depend on the number of threads.
#include <cmath>
#include <limits>
#include <memory>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace lic_fast {
namespace {

constexpr int64_t kStretch = 256;

// Channels of a buffer: a multiple of what is summed at once.
constexpr int64_t padded(int64_t channels) { return (channels + 31) / 32 * 32; }

struct Norm {
  const void* x;
  const void* grad;    // null forward
  const void* weight;  // of the arithmetic's dtype, like all that follow
  const void* bias;
  const void* shift;  // [C] of this image, or null
  void* out;          // y, or d_x
  void* sums;         // backward: d_weight, d_bias and d_shift of this stretch, [3, C], to be written
  int64_t rows, channels;
  double eps;
  bool relu;
  int32_t dtype;
};

// kLanes numbers at once: two registers of AVX-512, eight of the least instruction set.
template <class Acc>
struct Lanes {
  static constexpr int64_t kCount = 128 / sizeof(Acc);
  typedef Acc Half __attribute__((vector_size(64)));
  Half low = {}, high = {};

  // Adds a[i] b[i], or a[i] without b, for kCount neighbours.
  LIC_FAST_INLINE void add(const Acc* a, const Acc* b) {
    Half first, second, by_first, by_second;
    std::memcpy(&first, a, sizeof first);
    std::memcpy(&second, a + kCount / 2, sizeof second);
    if (b) {
      std::memcpy(&by_first, b, sizeof first);
      std::memcpy(&by_second, b + kCount / 2, sizeof second);
      first *= by_first;
      second *= by_second;
    }
    low += first;
    high += second;
  }

  LIC_FAST_INLINE Acc total() const {
    Acc lane[kCount / 2];
    const Half both = low + high;
    std::memcpy(lane, &both, sizeof lane);
    for (int64_t half = kCount / 4; half; half /= 2) {
      for (int64_t j = 0; j < half; ++j) lane[j] += lane[j + half];
    }
    return lane[0];
  }
};

// Sum of a[c] b[c], or of a[c] without b. Both have room for a multiple of Lanes::kCount, zero from C on.
template <class Acc>
LIC_FAST_INLINE Acc sum_of(int64_t C, const Acc* a, const Acc* b) {
  Lanes<Acc> lanes;
  for (int64_t c = 0; c < C; c += Lanes<Acc>::kCount) lanes.add(a + c, b ? b + c : nullptr);
  return lanes.total();
}

// value <- x less its mean; returns one over its standard deviation. value: as sum_of asks.
template <class T, class Acc>
LIC_FAST_INLINE Acc centre(const T* __restrict__ x, Acc* __restrict__ value, int64_t C, Acc eps) {
  for (int64_t c = 0; c < C; ++c) value[c] = convert<Acc>(x[c]);
  const Acc mean = sum_of<Acc>(C, value, nullptr) / static_cast<Acc>(C);
  for (int64_t c = 0; c < C; ++c) value[c] -= mean;
  return Acc(1) / std::sqrt(sum_of<Acc>(C, value, value) / static_cast<Acc>(C) + eps);
}

template <class T, class Acc>
LIC_FAST_INLINE void forward(const Norm& p, Acc* __restrict__ value) {
  const int64_t C = p.channels;
  const Acc* __restrict__ weight = static_cast<const Acc*>(p.weight);
  const Acc* __restrict__ bias = static_cast<const Acc*>(p.bias);
  const Acc* __restrict__ shift = static_cast<const Acc*>(p.shift);
  const Acc least = p.relu ? Acc(0) : -std::numeric_limits<Acc>::infinity();
  for (int64_t r = 0; r < p.rows; ++r) {
    T* __restrict__ y = static_cast<T*>(p.out) + r * C;
    const Acc inverse = centre(static_cast<const T*>(p.x) + r * C, value, C, static_cast<Acc>(p.eps));
    if (shift) {
      for (int64_t c = 0; c < C; ++c) {
        const Acc before = value[c] * inverse * weight[c] + bias[c];
        y[c] = convert<T>((before < least ? least : before) + shift[c]);  // NaN stays
      }
    } else {
      for (int64_t c = 0; c < C; ++c) {
        const Acc before = value[c] * inverse * weight[c] + bias[c];
        y[c] = convert<T>(before < least ? least : before);
      }
    }
  }
}

template <class T, class Acc>
LIC_FAST_INLINE void backward(const Norm& p, Acc* __restrict__ value) {
  const int64_t C = p.channels;
  Acc* __restrict__ scaled = value + padded(C);
  const Acc* __restrict__ weight = static_cast<const Acc*>(p.weight);
  const Acc* __restrict__ bias = static_cast<const Acc*>(p.bias);
  Acc* __restrict__ d_weight = static_cast<Acc*>(p.sums);
  Acc* __restrict__ d_bias = d_weight + C;
  Acc* __restrict__ d_shift = d_bias + C;
  for (int64_t c = 0; c < 3 * C; ++c) d_weight[c] = Acc(0);
  for (int64_t r = 0; r < p.rows; ++r) {
    const T* __restrict__ grad = static_cast<const T*>(p.grad) + r * C;
    T* __restrict__ d_x = static_cast<T*>(p.out) + r * C;
    const Acc inverse = centre(static_cast<const T*>(p.x) + r * C, value, C, static_cast<Acc>(p.eps));
    for (int64_t c = 0; c < C; ++c) {
      value[c] *= inverse;
      const Acc g = convert<Acc>(grad[c]), before = value[c] * weight[c] + bias[c];
      const Acc kept = p.relu && !(before > Acc(0)) ? Acc(0) : g;
      d_shift[c] += g;
      d_bias[c] += kept;
      d_weight[c] += kept * value[c];
      scaled[c] = kept * weight[c];
    }
    const Acc count = static_cast<Acc>(C);
    const Acc mean = sum_of<Acc>(C, scaled, nullptr) / count;
    const Acc along = sum_of<Acc>(C, scaled, value) / count;
    for (int64_t c = 0; c < C; ++c) d_x[c] = convert<T>((scaled[c] - mean - value[c] * along) * inverse);
  }
}

template <class Isa, class T, class Acc>
LIC_FAST_INLINE void rows_of(const Norm& p, void* room) {
  p.grad ? backward<T, Acc>(p, static_cast<Acc*>(room)) : forward<T, Acc>(p, static_cast<Acc*>(room));
}

template <class Isa>
LIC_FAST_INLINE void run_rows_body(const Norm& p, void* room) {
  switch (p.dtype) {
    case kFloat32: return rows_of<Isa, float, float>(p, room);
    case kBFloat16: return rows_of<Isa, BFloat16, float>(p, room);
    default: return rows_of<Isa, double, double>(p, room);
  }
}

LIC_FAST_SIMD_VARIANTS(run_rows, (const Norm& p, void* room), (p, room));

struct Shape {
  int64_t images, places, channels, stretches;  // stretches of an image's places
};

Shape shape_of(const Tensor& x) {
  const int64_t B = x.size(0), C = x.size(x.dim() - 1), places = B && C ? x.numel() / (B * C) : 0;
  return {B, places, C, (places + kStretch - 1) / kStretch};
}

void check(const Tensor& x, std::initializer_list<const Tensor*> alike_x, std::initializer_list<const Tensor*> others) {
  const int32_t code = dtype_code(x);
  STD_TORCH_CHECK(code == kFloat32 || code == kBFloat16 || code == kFloat64,
                  "lic_fast: channel_norm takes float32, bfloat16 and float64");
  STD_TORCH_CHECK(x.is_contiguous(), "lic_fast: channel_norm takes contiguous rows");
  for (const Tensor* t : alike_x) {
    check_same_numel(x, *t);
    STD_TORCH_CHECK(t->is_contiguous() && dtype_code(*t) == code, "lic_fast: channel_norm takes tensors alike");
  }
  for (const Tensor* t : others) {
    STD_TORCH_CHECK(t->is_contiguous() && dtype_code(*t) == (code == kFloat64 ? kFloat64 : kFloat32),
                    "lic_fast: channel_norm takes parameters of the arithmetic's dtype");
  }
}

// Calls body(image, first place, places, room) for all stretches; room holds 2 padded(C) numbers, zero.
template <class Body>
void over_stretches(const Shape& s, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kSerialElements / (kStretch * std::max<int64_t>(1, s.channels)));
  torch::stable::parallel_for(0, s.images * s.stretches, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<double[]> room(new double[2 * padded(s.channels)]());
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t % s.stretches * kStretch;
      body(t, t / s.stretches, first, std::min(kStretch, s.places - first), room.get());
    }
  });
}

void channel_norm_out(Tensor x, Tensor weight, Tensor bias, Tensor shift, bool relu, double eps, Tensor y) {
  check(x, {&y}, {&weight, &bias, &shift});
  const Shape s = shape_of(x);
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
                   eps,
                   relu,
                   dtype_code(x)};
  const void* shifts = shift.numel() ? shift.const_data_ptr() : nullptr;
  over_stretches(s, [&](int64_t, int64_t image, int64_t first, int64_t rows, void* room) {
    Norm part = whole;
    const int64_t at = (image * s.places + first) * s.channels;
    part.x = advance(whole.x, at, size);
    part.out = advance(whole.out, at, size);
    part.shift = advance(shifts, image * s.channels, wide);
    part.rows = rows;
    run_rows(part, room);
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

void channel_norm_bwd_out(Tensor grad, Tensor x, Tensor weight, Tensor bias, bool relu, double eps, Tensor d_x,
                          Tensor d_weight, Tensor d_bias, Tensor d_shift) {
  check(x, {&grad, &d_x}, {&weight, &bias, &d_weight, &d_bias, &d_shift});
  const Shape s = shape_of(x);
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
                   eps,
                   relu,
                   dtype_code(x)};
  over_stretches(s, [&](int64_t t, int64_t image, int64_t first, int64_t rows, void* room) {
    Norm part = whole;
    const int64_t at = (image * s.places + first) * s.channels;
    part.x = advance(whole.x, at, size);
    part.grad = advance(whole.grad, at, size);
    part.out = advance(whole.out, at, size);
    part.sums = advance(static_cast<void*>(sums.get()), t * 3 * s.channels, wide);
    part.rows = rows;
    run_rows(part, room);
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
      "channel_norm_out(Tensor x, Tensor weight, Tensor bias, Tensor shift, bool relu, float eps, Tensor(a!) y) -> ()");
  m.def(
      "channel_norm_bwd_out(Tensor grad, Tensor x, Tensor weight, Tensor bias, bool relu, float eps, Tensor(a!) d_x, "
      "Tensor(b!) d_weight, Tensor(c!) d_bias, Tensor(d!) d_shift) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("channel_norm_out", TORCH_BOX(&lic_fast::channel_norm_out));
  m.impl("channel_norm_bwd_out", TORCH_BOX(&lic_fast::channel_norm_bwd_out));
}
