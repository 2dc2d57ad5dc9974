// Comparisons and choices, element by element, for numbers and for GCC's vectors of them.
//
// g++ 12 takes `a < b` and `a < b ? x : y` of 64-byte vectors apart, lane by lane, in many places. So the comparison of
// those is the instruction itself, and a choice is made of bits.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__x86_64__) && !defined(__CUDACC__)
#include <immintrin.h>  // declares the instruction
#endif

#ifdef __CUDACC__
#define LIC_FAST_ANYWHERE __host__ __device__ __forceinline__
#define LIC_FAST_UNROLL _Pragma("unroll")
#define LIC_FAST_UNROLL_ON_DEVICE _Pragma("unroll")  // arrays that the loop indexes stay in registers
#else
#define LIC_FAST_ANYWHERE inline __attribute__((always_inline))
#define LIC_FAST_UNROLL _Pragma("GCC unroll 4")
#define LIC_FAST_UNROLL_ON_DEVICE
#endif

#if defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors pass between functions that are always inlined
#endif

namespace lic_fast {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define LIC_FAST_LESS16
typedef float Float16Lanes __attribute__((vector_size(64)));
typedef int32_t Int16Lanes __attribute__((vector_size(64)));
LIC_FAST_ANYWHERE Int16Lanes less16(Float16Lanes a, Float16Lanes b) {  // in code for AVX-512 only
  return Int16Lanes(__builtin_ia32_cvtmask2d512(__builtin_ia32_cmpps512_mask(a, b, 17, -1, 4)));
}
#endif

// Whether a < b: a bool, or a vector of 0 and -1. False where one is NaN.
template <class V>
LIC_FAST_ANYWHERE auto less(V a, V b) {
#ifdef LIC_FAST_LESS16
  if constexpr (!std::is_arithmetic_v<V> && sizeof(V) == 64) {
    return less16(a, b);
  } else {
    return a < b;
  }
#else
  return a < b;
#endif
}

// a where the comparison holds, else b
template <class C, class V>
LIC_FAST_ANYWHERE V choose(C comparison, V a, V b) {
  if constexpr (std::is_arithmetic_v<V>) {  // | and & make an int of two bools
    return comparison ? a : b;
  } else {
    return V((comparison & C(a)) | (~comparison & C(b)));
  }
}

// x, or the limit where x is beyond it; NaN stays.
template <class V>
LIC_FAST_ANYWHERE V at_most(V x, V limit) {
#ifdef LIC_FAST_LESS16
  if constexpr (!std::is_arithmetic_v<V> && sizeof(V) == 64) {
    return V(__builtin_ia32_minps512_mask(limit, x, V{}, -1, 4));
  } else if constexpr (!std::is_arithmetic_v<V> && sizeof(V) == 32) {
    return V(__builtin_ia32_minps256(limit, x));
  } else {
    return choose(less(limit, x), limit, x);
  }
#else
  return choose(less(limit, x), limit, x);
#endif
}
template <class V>
LIC_FAST_ANYWHERE V at_least(V x, V limit) {
#ifdef LIC_FAST_LESS16
  if constexpr (!std::is_arithmetic_v<V> && sizeof(V) == 64) {
    return V(__builtin_ia32_maxps512_mask(limit, x, V{}, -1, 4));
  } else if constexpr (!std::is_arithmetic_v<V> && sizeof(V) == 32) {
    return V(__builtin_ia32_maxps256(limit, x));
  } else {
    return choose(less(x, limit), limit, x);
  }
#else
  return choose(less(x, limit), limit, x);
#endif
}

}  // namespace lic_fast
