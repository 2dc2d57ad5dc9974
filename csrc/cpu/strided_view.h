// Reads a gradient of any strides and dtype into contiguous planes, and applies an update lying in planes to a
// parameter of any strides and dtype. Both walk blocks of kBlockR rows by kBlockC columns, tap by tap: a convolution's
// taps lie side by side in memory, and the lines of a block stay in L1 or L2 until every tap has used them.
#pragma once

#include "cpu/planes.h"

namespace lic_fast {

struct View {
  void* data = nullptr;
  int32_t code = -1;
  int64_t row_step = 0, column_step = 1;
  std::vector<int64_t> tap_offset{0};
};

inline View make_view(const Tensor& tensor, bool writable) {
  View view;
  view.data = writable ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
  view.code = dtype_code(tensor);
  const int64_t axes = tensor.dim();
  view.column_step = tensor.stride(axes - 1);
  view.row_step = axes > 1 ? tensor.stride(axes - 2) : 0;
  for (int64_t a = 0; a < axes - 2; ++a) {
    std::vector<int64_t> offsets;
    for (const int64_t offset : view.tap_offset) {
      for (int64_t i = 0; i < tensor.size(a); ++i) offsets.push_back(offset + i * tensor.stride(a));
    }
    view.tap_offset.swap(offsets);
  }
  return view;
}

// Whether every element has a place of its own (sufficient, and true of any permutation or slice of a dense tensor).
inline bool apart(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> steps;  // stride, size
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) != 1) steps.emplace_back(tensor.stride(i), tensor.size(i));
  }
  std::sort(steps.begin(), steps.end());
  int64_t reach = 1;
  for (const auto& [stride, size] : steps) {
    if (stride < reach) return false;
    reach = stride * (size - 1) + reach;
  }
  return true;
}

struct Apply {  // value = p - step * update; p <- value - decay * value
  double step, decay;
};

namespace {

constexpr int64_t kBlockR = 16, kBlockC = 64;

// Calls row(offset in the view, place in the planes, n) for stretches of at most kBlockC columns.
template <class Row>
LIC_FAST_INLINE void walk(const View& view, const Planes& planes, const Row& row) {
  const int64_t R = planes.rows, C = planes.columns;
  for (int64_t r = 0; r < R; r += kBlockR) {
    for (int64_t c = 0; c < C; c += kBlockC) {
      const int64_t n = std::min(kBlockC, C - c);
      for (int64_t i = r; i < std::min(R, r + kBlockR); ++i) {
        for (int64_t t = 0; t < planes.taps; ++t) {
          row(view.tap_offset[t] + i * view.row_step + c * view.column_step, (t * R + i) * C + c, n);
        }
      }
    }
  }
}

template <class T, class From>
LIC_FAST_INLINE bool gather_of(const View& view, const Planes& planes, void* to_ptr) {
  const From* data = static_cast<const From*>(view.data);
  T* to = static_cast<T*>(to_ptr);
  const int64_t step = view.column_step;
  uint32_t most = 0;
  walk(view, planes, [&](int64_t offset, int64_t place, int64_t n) __attribute__((always_inline)) {
    const From* __restrict__ x = data + offset;
    T* __restrict__ y = to + place;
    uint32_t largest = 0;
    if (step == 1) {
      for (int64_t e = 0; e < n; ++e) {
        largest = std::max(largest, Magnitude<From>::of(x[e]));
        y[e] = convert<T>(x[e]);
      }
    } else {
      for (int64_t e = 0; e < n; ++e) {
        largest = std::max(largest, Magnitude<From>::of(x[e * step]));
        y[e] = convert<T>(x[e * step]);
      }
    }
    most = std::max(most, largest);
  });
  return most < Magnitude<From>::kNotFinite;
}

// Returns (in *finite) whether every element is finite; the planes are then complete.
template <class Isa>
LIC_FAST_INLINE void run_gather_body(const View& view, const Planes& planes, void* to, bool f64, bool* finite) {
  if (f64) {
    *finite = gather_of<double, double>(view, planes, to);
  } else if (view.code == kFloat32) {
    *finite = gather_of<float, float>(view, planes, to);
  } else if (view.code == kBFloat16) {
    *finite = gather_of<float, BFloat16>(view, planes, to);
  } else {
    *finite = gather_of<float, double>(view, planes, to);
  }
}

LIC_FAST_SIMD_VARIANTS(run_gather, (const View& view, const Planes& planes, void* to, bool f64, bool* finite),
                       (view, planes, to, f64, finite));

template <class T, class P>
LIC_FAST_INLINE void apply_of(const View& view, const Planes& planes, const void* update_ptr, const Apply& how) {
  P* data = static_cast<P*>(view.data);
  const T* update = static_cast<const T*>(update_ptr);
  const T step = static_cast<T>(how.step), decay = static_cast<T>(how.decay);
  const int64_t stride = view.column_step;
  const auto moved = [=](P old, T u) __attribute__((always_inline)) {
    const T value = convert<T>(old) - step * u;
    return convert<P>(value - decay * value);
  };
  walk(view, planes, [&](int64_t offset, int64_t place, int64_t n) __attribute__((always_inline)) {
    P* __restrict__ p = data + offset;
    const T* __restrict__ u = update + place;
    if (stride == 1) {
      for (int64_t e = 0; e < n; ++e) p[e] = moved(p[e], u[e]);
    } else {
      for (int64_t e = 0; e < n; ++e) p[e * stride] = moved(p[e * stride], u[e]);
    }
  });
}

template <class Isa>
LIC_FAST_INLINE void run_apply_body(const View& view, const Planes& planes, const void* update, const Apply& how,
                                    bool f64) {
  if (f64) {
    apply_of<double, double>(view, planes, update, how);
  } else if (view.code == kFloat32) {
    apply_of<float, float>(view, planes, update, how);
  } else if (view.code == kBFloat16) {
    apply_of<float, BFloat16>(view, planes, update, how);
  } else {
    apply_of<float, double>(view, planes, update, how);
  }
}

LIC_FAST_SIMD_VARIANTS(run_apply,
                       (const View& view, const Planes& planes, const void* update, const Apply& how, bool f64),
                       (view, planes, update, how, f64));

}  // namespace
}  // namespace lic_fast
