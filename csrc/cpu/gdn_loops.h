// The element-wise loops of gdn.cpp over tiles [rows = channels, step], of which `columns` positions are used.
#pragma once

#include <cmath>

#include "cpu/simd.h"

namespace lic_fast {

enum FactorKind : int32_t { kRsqrt, kSqrt, kReciprocal, kIdentity };  // what norm becomes before x is multiplied by it

struct Tile {
  int64_t rows, columns, step;
  bool f64;
  FactorKind kind;
};

inline bool simplified(FactorKind kind) { return kind == kReciprocal || kind == kIdentity; }

// out = x^2, or |x|.
template <class T>
LIC_FAST_INLINE void magnitudes_of(const Tile& t, const void* x_ptr, void* out_ptr) {
  for (int64_t r = 0; r < t.rows; ++r) {
    const T* __restrict__ x = static_cast<const T*>(x_ptr) + r * t.step;
    T* __restrict__ out = static_cast<T*>(out_ptr) + r * t.step;
    if (simplified(t.kind)) {
      for (int64_t i = 0; i < t.columns; ++i) out[i] = std::abs(x[i]);
    } else {
      for (int64_t i = 0; i < t.columns; ++i) out[i] = x[i] * x[i];
    }
  }
}

template <class Isa>
LIC_FAST_INLINE void magnitudes_body(const Tile& t, const void* x, void* out) {
  t.f64 ? magnitudes_of<double>(t, x, out) : magnitudes_of<float>(t, x, out);
}

// factor [rows, step] = 1 / sqrt(sum [rows, sum_step] + beta [rows]). Called, not inlined, like LookUp.
template <class Isa, class T>
struct InverseRoot {
  static LIC_FAST_INLINE void run(const Tile& t, const T* sum, int64_t sum_step, const T* beta, T* factor) {
    for (int64_t r = 0; r < t.rows; ++r) {
      for (int64_t i = 0; i < t.columns; ++i) {
        factor[r * t.step + i] = T(1) / std::sqrt(sum[r * sum_step + i] + beta[r]);
      }
    }
  }
};

#if defined(__x86_64__)
// The estimate of 14 bits and one step of Newton's: an error of 1 ulp or so, for a third of the time of a root and a
// division. Where the norm is zero, infinite, negative or NaN the estimate is exact, and the step would spoil it.
template <>
struct InverseRoot<Avx512, float> {
  LIC_FAST_TARGET(LIC_FAST_AVX512)
  static void run(const Tile& t, const float* sum, int64_t sum_step, const float* beta, float* factor) {
    const __m512 half = _mm512_set1_ps(0.5f);
    for (int64_t r = 0; r < t.rows; ++r) {
      const __m512 shift = _mm512_set1_ps(beta[r]);
      for (int64_t i = 0; i < t.columns; i += 16) {
        const int64_t left = t.columns - i;
        const __mmask16 lanes = left < 16 ? static_cast<__mmask16>((1u << left) - 1) : static_cast<__mmask16>(0xFFFF);
        const __m512 norm = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, sum + r * sum_step + i), shift);
        const __m512 y = _mm512_rsqrt14_ps(norm);
        const __mmask16 special = _mm512_fpclass_ps_mask(norm, 0x01 | 0x02 | 0x04 | 0x08 | 0x10 | 0x40 | 0x80);
        // y + y (1 - norm y^2) / 2: a small correction, which rounds once
        const __m512 rest = _mm512_fnmadd_ps(_mm512_mul_ps(norm, y), y, _mm512_set1_ps(1.0f));
        const __m512 better = _mm512_fmadd_ps(_mm512_mul_ps(y, half), rest, y);
        _mm512_mask_storeu_ps(factor + r * t.step + i, lanes, _mm512_mask_mov_ps(better, special, y));
      }
    }
  }
};
#endif

// factor of norm = sum + beta; x, where given, is multiplied by it in place.
template <class Isa, class T>
LIC_FAST_INLINE void to_factor_of(const Tile& t, const void* sum_ptr, int64_t sum_step, const void* beta_ptr,
                                  void* factor_ptr, void* x_ptr) {
  const T* beta = static_cast<const T*>(beta_ptr);
  if (t.kind == kRsqrt) {
    InverseRoot<Isa, T>::run(t, static_cast<const T*>(sum_ptr), sum_step, beta, static_cast<T*>(factor_ptr));
  }
  for (int64_t r = 0; r < t.rows; ++r) {
    const T* __restrict__ sum = static_cast<const T*>(sum_ptr) + r * sum_step;
    T* __restrict__ factor = static_cast<T*>(factor_ptr) + r * t.step;
    const T shift = beta[r];
    if (t.kind == kSqrt) {
      for (int64_t i = 0; i < t.columns; ++i) factor[i] = std::sqrt(sum[i] + shift);
    } else if (t.kind == kReciprocal) {
      for (int64_t i = 0; i < t.columns; ++i) factor[i] = T(1) / (sum[i] + shift);
    } else if (t.kind == kIdentity) {
      for (int64_t i = 0; i < t.columns; ++i) factor[i] = sum[i] + shift;
    }
    if (x_ptr) {
      T* __restrict__ x = static_cast<T*>(x_ptr) + r * t.step;
      for (int64_t i = 0; i < t.columns; ++i) x[i] *= factor[i];
    }
  }
}

template <class Isa>
LIC_FAST_INLINE void to_factor_body(const Tile& t, const void* sum, int64_t sum_step, const void* beta, void* factor,
                                    void* x) {
  t.f64 ? to_factor_of<Isa, double>(t, sum, sum_step, beta, factor, x)
        : to_factor_of<Isa, float>(t, sum, sum_step, beta, factor, x);
}

template <FactorKind kind, class T>
LIC_FAST_INLINE T norm_gradient(T g, T x, T f) {
  if constexpr (kind == kRsqrt) return T(-0.5) * ((g * f) * (x * f) * f);  // f^3 alone would overflow first
  if constexpr (kind == kSqrt) return T(0.5) * (g * x / f);
  if constexpr (kind == kReciprocal) return -((g * f) * (x * f));
  return g * x;
}

// d_norm [rows, step] from g, x and the factor; g <- g * factor; d_beta[r] += the sum of row r. The sum has kLanes
// terms side by side whatever the instruction set, added in their order.
template <FactorKind kind, class T>
LIC_FAST_INLINE void norm_gradients_of(const Tile& t, void* g_ptr, const void* x_ptr, const void* factor_ptr,
                                       void* d_norm_ptr, void* d_beta) {
  constexpr int64_t kLanes = 32;
  for (int64_t r = 0; r < t.rows; ++r) {
    T* __restrict__ g = static_cast<T*>(g_ptr) + r * t.step;
    const T* __restrict__ x = static_cast<const T*>(x_ptr) + r * t.step;
    const T* __restrict__ f = static_cast<const T*>(factor_ptr) + r * t.step;
    T* __restrict__ d = static_cast<T*>(d_norm_ptr) + r * t.step;
    for (int64_t i = 0; i < t.columns; ++i) {
      d[i] = norm_gradient<kind>(g[i], x[i], f[i]);
      g[i] *= f[i];
    }
    T sums[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= t.columns; i += kLanes) {
      for (int64_t l = 0; l < kLanes; ++l) sums[l] += d[i + l];
    }
    for (int64_t l = 0; i + l < t.columns; ++l) sums[l] += d[i + l];
    for (int64_t width = kLanes / 2; width > 0; width /= 2) {
      for (int64_t l = 0; l < width; ++l) sums[l] += sums[l + width];
    }
    static_cast<T*>(d_beta)[r] += sums[0];
  }
}

template <class T>
LIC_FAST_INLINE void norm_gradients_by_kind(const Tile& t, void* g, const void* x, const void* f, void* d, void* sum) {
  if (t.kind == kRsqrt) norm_gradients_of<kRsqrt, T>(t, g, x, f, d, sum);
  if (t.kind == kSqrt) norm_gradients_of<kSqrt, T>(t, g, x, f, d, sum);
  if (t.kind == kReciprocal) norm_gradients_of<kReciprocal, T>(t, g, x, f, d, sum);
  if (t.kind == kIdentity) norm_gradients_of<kIdentity, T>(t, g, x, f, d, sum);
}

template <class Isa>
LIC_FAST_INLINE void norm_gradients_body(const Tile& t, void* g, const void* x, const void* factor, void* d_norm,
                                         void* d_beta) {
  t.f64 ? norm_gradients_by_kind<double>(t, g, x, factor, d_norm, d_beta)
        : norm_gradients_by_kind<float>(t, g, x, factor, d_norm, d_beta);
}

// d_x += (derivative of x^2 or |x|) * through [rows, through_step].
template <class T>
LIC_FAST_INLINE void add_through_of(const Tile& t, const void* through_ptr, int64_t through_step, const void* x_ptr,
                                    void* d_x_ptr) {
  for (int64_t r = 0; r < t.rows; ++r) {
    const T* __restrict__ through = static_cast<const T*>(through_ptr) + r * through_step;
    const T* __restrict__ x = static_cast<const T*>(x_ptr) + r * t.step;
    T* __restrict__ d_x = static_cast<T*>(d_x_ptr) + r * t.step;
    if (simplified(t.kind)) {
      for (int64_t i = 0; i < t.columns; ++i) {
        d_x[i] += (static_cast<T>(x[i] > 0) - static_cast<T>(x[i] < 0)) * through[i];
      }
    } else {
      for (int64_t i = 0; i < t.columns; ++i) d_x[i] += T(2) * x[i] * through[i];
    }
  }
}

template <class Isa>
LIC_FAST_INLINE void add_through_body(const Tile& t, const void* through, int64_t through_step, const void* x,
                                      void* d_x) {
  t.f64 ? add_through_of<double>(t, through, through_step, x, d_x)
        : add_through_of<float>(t, through, through_step, x, d_x);
}

LIC_FAST_SIMD_VARIANTS(magnitudes, (const Tile& t, const void* x, void* out), (t, x, out));
LIC_FAST_SIMD_VARIANTS(to_factor,
                       (const Tile& t, const void* sum, int64_t step, const void* beta, void* factor, void* x),
                       (t, sum, step, beta, factor, x));
LIC_FAST_SIMD_VARIANTS(norm_gradients,
                       (const Tile& t, void* g, const void* x, const void* factor, void* d_norm, void* d_beta),
                       (t, g, x, factor, d_norm, d_beta));
LIC_FAST_SIMD_VARIANTS(add_through, (const Tile& t, const void* through, int64_t step, const void* x, void* d_x),
                       (t, through, step, x, d_x));

}  // namespace lic_fast
