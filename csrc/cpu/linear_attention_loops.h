// Loops of linear_attention.cpp over a tile of keys: the softmax over places as far as they have come, and gradients.
#pragma once

#include <cmath>
#include <type_traits>

#include "cpu/vector_math.h"

namespace lic_fast {

// Rows of keys [places, step] and what is known of each channel from the places before.
struct Keys {
  const void* keys;  // step: a multiple of a vector
  int64_t step, places, channels;
  void* share;                // [places, channels up to whole vectors]: exp(k - maximum)
  void *maximum, *sum, *old;  // [channels ...]: so far; old: by what all before is to be multiplied
  bool f64;
};

// Takes places into maximum and sum. Returns whether any of `old` is not 1.
template <class M>
LIC_FAST_INLINE bool soften_of(const Keys& t) {
  using S = typename M::Scalar;
  const int64_t width = (t.channels + M::kLanes - 1) / M::kLanes * M::kLanes;
  const auto least = M::all(static_cast<S>(-HUGE_VAL));
  bool moved = false;
  for (int64_t j = 0; j < t.channels; j += M::kLanes) {
    const S* from = static_cast<const S*>(t.keys) + j;
    S* to = static_cast<S*>(t.share) + j;
    S *maximum = static_cast<S*>(t.maximum) + j, *total = static_cast<S*>(t.sum) + j, *old = static_cast<S*>(t.old) + j;
    const auto before = M::load(maximum);
    auto top = before;                             // NaN is passed over
    decltype(top) tops[4] = {top, top, top, top};  // a comparison takes longer than a load
    for (int64_t r = 0; r + 4 <= t.places; r += 4) {
      for (int i = 0; i < 4; ++i) tops[i] = M::greater(tops[i], M::load(from + (r + i) * t.step));
    }
    for (int64_t r = t.places / 4 * 4; r < t.places; ++r) top = M::greater(top, M::load(from + r * t.step));
    for (int i = 0; i < 4; ++i) top = M::greater(top, tops[i]);
    const auto finite = M::select(M::equal(top, least), M::all(S(0)), top);            // -inf - -inf would be NaN
    decltype(top) sums[4] = {M::all(S(0)), M::all(S(0)), M::all(S(0)), M::all(S(0))};  // rounds less than one would
    const auto take = [&](int64_t r, int i) __attribute__((always_inline)) {
      const auto share = M::exp_negative(M::load(from + r * t.step) - finite);
      sums[i] = sums[i] + share;
      M::store(to + r * width, share);
    };
    for (int64_t r = 0; r + 4 <= t.places; r += 4) {
      for (int i = 0; i < 4; ++i) take(r + i, i);
    }
    for (int64_t r = t.places / 4 * 4; r < t.places; ++r) take(r, 0);
    const auto sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    const auto scale = M::exp_negative(before - finite);
    moved = moved || M::any(M::no(M::equal(scale, M::all(S(1)))));
    M::store(total, M::load(total) * scale + sum);
    M::store(old, scale);
    M::store(maximum, top);
  }
  return moved;
}

template <class Isa>
LIC_FAST_INLINE void soften_body(const Keys& t, bool* moved) {
  *moved = t.f64 ? soften_of<ScalarMath>(t) : soften_of<VectorMath<Isa>>(t);
}

// Each of rows [n, width] times factor [width].
template <class T>
LIC_FAST_INLINE void rescale_of(void* rows, int64_t n, int64_t width, const void* by) {
  const T* __restrict__ factor = static_cast<const T*>(by);
  for (int64_t r = 0; r < n; ++r) {
    T* __restrict__ row = static_cast<T*>(rows) + r * width;
    for (int64_t i = 0; i < width; ++i) row[i] *= factor[i];
  }
}

template <class Isa>
LIC_FAST_INLINE void rescale_body(void* rows, int64_t n, int64_t width, const void* by, bool f64) {
  f64 ? rescale_of<double>(rows, n, width, by) : rescale_of<float>(rows, n, width, by);
}

// Rows of a tile [rows, step], each with a number of its own.
struct Rows {
  void* values;
  int64_t rows, columns, step;  // step: a multiple of a vector
  const void* own;              // [rows]
  const void* sum_of_shares;    // [rows]: of to_shares alone
  const void* sum;              // [rows, sum_step]
  int64_t sum_step;
  void* out;  // [rows, step]
  bool f64;
};

// values = exp(values - own) / sum_of_shares.
template <class M>
LIC_FAST_INLINE void to_shares_of(const Rows& t) {
  using S = typename M::Scalar;
  for (int64_t r = 0; r < t.rows; ++r) {
    S* row = static_cast<S*>(t.values) + r * t.step;
    const auto own = M::all(static_cast<const S*>(t.own)[r]);
    const auto inverse = M::all(S(1) / static_cast<const S*>(t.sum_of_shares)[r]);
    for (int64_t i = 0; i < t.columns; i += M::kLanes)
      M::store(row + i, M::exp_negative(M::load(row + i) - own) * inverse);
  }
}

template <class Isa>
LIC_FAST_INLINE void to_shares_body(const Rows& t) {
  t.f64 ? to_shares_of<ScalarMath>(t) : to_shares_of<VectorMath<Isa>>(t);
}

// out = values (sum - own).
template <class S>
LIC_FAST_INLINE void through_softmax_of(const Rows& t) {
  for (int64_t r = 0; r < t.rows; ++r) {
    const S* __restrict__ share = static_cast<const S*>(t.values) + r * t.step;
    const S* __restrict__ sum = static_cast<const S*>(t.sum) + r * t.sum_step;
    S* __restrict__ out = static_cast<S*>(t.out) + r * t.step;
    const S own = static_cast<const S*>(t.own)[r];
    for (int64_t i = 0; i < t.columns; ++i) out[i] = share[i] * (sum[i] - own);
  }
}

template <class Isa>
LIC_FAST_INLINE void through_softmax_body(const Rows& t) {
  t.f64 ? through_softmax_of<double>(t) : through_softmax_of<float>(t);
}

LIC_FAST_SIMD_VARIANTS(soften, (const Keys& t, bool* moved), (t, moved));
LIC_FAST_SIMD_VARIANTS(rescale, (void* rows, int64_t n, int64_t width, const void* by, bool f64),
                       (rows, n, width, by, f64));
LIC_FAST_SIMD_VARIANTS(to_shares, (const Rows& t), (t));
LIC_FAST_SIMD_VARIANTS(through_softmax, (const Rows& t), (t));

}  // namespace lic_fast
