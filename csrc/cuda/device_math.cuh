// The policy of arithmetic (common/polynomial.h, common/likelihood.h) of device threads: one float or double.
#pragma once

#include "cuda/device.cuh"

namespace lic_fast {

template <class T>
struct DeviceMath {
  using Scalar = T;
  using Value = T;
  using Mask = bool;
  static __device__ __forceinline__ T all(T x) { return x; }
  static __device__ __forceinline__ T fused(T a, T b, T c) { return a * b + c; }
  static __device__ __forceinline__ T select(bool mask, T a, T b) { return mask ? a : b; }
  static __device__ __forceinline__ bool less(T a, T b) { return a < b; }
  static __device__ __forceinline__ bool no_less(T a, T b) { return a >= b; }
  static __device__ __forceinline__ bool equal(T a, T b) { return a == b; }
  static __device__ __forceinline__ bool both(bool a, bool b) { return a & b; }
  static __device__ __forceinline__ bool no(bool mask) { return !mask; }
  static __device__ __forceinline__ bool any(bool mask) { return mask; }
  static __device__ __forceinline__ T abs(T x) { return x < 0 ? -x : x; }
  static __device__ __forceinline__ T at_most(T x, T limit) { return x > limit ? limit : x; }
  static __device__ __forceinline__ T at_least(T x, T limit) { return x < limit ? limit : x; }
  static __device__ __forceinline__ T greater(T x, T y) { return x < y ? y : x; }
  static __device__ __forceinline__ T reciprocal(T x) { return T(1) / x; }
  static __device__ __forceinline__ float round(float x) { return rintf(x); }
  static __device__ __forceinline__ double round(double x) { return rint(x); }
  static __device__ __forceinline__ float exp(float x) { return expf(x); }
  static __device__ __forceinline__ double exp(double x) { return ::exp(x); }
  static __device__ __forceinline__ T exp_negative(T x) { return exp(x); }
  static __device__ __forceinline__ float expm1_negative(float x) { return expm1f(x); }
  static __device__ __forceinline__ double expm1_negative(double x) { return ::expm1(x); }
  static __device__ __forceinline__ float log(float x) { return logf(x); }
  static __device__ __forceinline__ double log(double x) { return ::log(x); }
  static __device__ __forceinline__ T log_normal(T x) { return log(x); }
  static __device__ __forceinline__ double erfcx(double x) { return ::erfcx(x); }
};

}  // namespace lic_fast
