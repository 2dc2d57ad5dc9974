// SIMD variants of a loop, chosen once at load by what the processor has; never -march=native.
//
// A loop is written once as an always-inline function template `<name>_body<Isa>` in plain C++.
// LIC_FAST_SIMD_VARIANTS makes three functions that inline it, each compiled for another instruction set and vectorised
// by the compiler, and a pointer `name` to the best one. Where the compiler needs help (table look-ups), a function is
// overloaded on the Isa tag. The library is compiled with -ffp-contract=off, so every variant rounds the same
// way. LIC_FAST_SIMD=generic|avx2 in the environment asks for a lesser one (tests compare them bit for bit).
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define LIC_FAST_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__)
#define LIC_FAST_TARGET(isa) __attribute__((target(isa)))
#else
#define LIC_FAST_TARGET(isa)
#endif
#define LIC_FAST_AVX2 "avx2,fma"
#define LIC_FAST_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"

namespace lic_fast {

struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
LIC_FAST_INLINE To convert(From value) {
  return static_cast<To>(value);
}

template <>
LIC_FAST_INLINE float convert<float, BFloat16>(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

template <>
LIC_FAST_INLINE BFloat16 convert<BFloat16, float>(float value) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded)};
}

template <>
LIC_FAST_INLINE double convert<double, BFloat16>(BFloat16 value) {
  return convert<float>(value);
}

template <class T>
LIC_FAST_INLINE T select(bool condition, T a, T b) {
  return condition ? a : b;
}

struct Generic {};
struct Avx2 {};
struct Avx512 {};

// values[i] = table[index[i]]. Called, not inlined: code without a target cannot inline code with one.
template <class Isa, class Value, class Index>
struct LookUp {
  static LIC_FAST_INLINE void run(const Value* table, int64_t, const Index* index, int64_t n, Value* values) {
    for (int64_t i = 0; i < n; ++i) values[i] = table[index[i]];
  }
};

#if defined(__x86_64__)
LIC_FAST_TARGET(LIC_FAST_AVX512) LIC_FAST_INLINE __m512i load16(const uint8_t* index) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index)));
}
LIC_FAST_TARGET(LIC_FAST_AVX512) LIC_FAST_INLINE __m512i load16(const int16_t* index) {
  return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)));
}
LIC_FAST_TARGET(LIC_FAST_AVX512) LIC_FAST_INLINE __m512i load16(const int32_t* index) {
  return _mm512_loadu_si512(index);
}
LIC_FAST_TARGET(LIC_FAST_AVX2) LIC_FAST_INLINE __m256i load8(const uint8_t* index) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(index)));
}
LIC_FAST_TARGET(LIC_FAST_AVX2) LIC_FAST_INLINE __m256i load8(const int16_t* index) {
  return _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index)));
}
LIC_FAST_TARGET(LIC_FAST_AVX2) LIC_FAST_INLINE __m256i load8(const int32_t* index) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
}

template <class Index>
struct LookUp<Avx512, float, Index> {  // up to 16 or 32 entries live in registers, more are gathered
  LIC_FAST_TARGET(LIC_FAST_AVX512)
  static void run(const float* table, int64_t size, const Index* index, int64_t n, float* values) {
    int64_t i = 0;
    const int64_t first = size < 16 ? size : 16, second = size < 32 ? size - first : 16;
    const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << first) - 1), table);
    if (size <= 16) {
      for (; i + 16 <= n; i += 16) _mm512_storeu_ps(values + i, _mm512_permutexvar_ps(load16(index + i), low));
    } else if (size <= 32) {
      const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << second) - 1), table + 16);
      for (; i + 16 <= n; i += 16) {
        _mm512_storeu_ps(values + i, _mm512_permutex2var_ps(low, load16(index + i), high));
      }
    } else {
      for (; i + 16 <= n; i += 16) _mm512_storeu_ps(values + i, _mm512_i32gather_ps(load16(index + i), table, 4));
    }
    for (; i < n; ++i) values[i] = table[index[i]];
  }
};

template <class Index>
struct LookUp<Avx2, float, Index> {
  LIC_FAST_TARGET(LIC_FAST_AVX2)
  static void run(const float* table, int64_t, const Index* index, int64_t n, float* values) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(values + i, _mm256_i32gather_ps(table, load8(index + i), 4));
    for (; i < n; ++i) values[i] = table[index[i]];
  }
};
#endif

template <class F>
F select_simd(F generic, F avx2, F avx512) {
#if defined(__x86_64__)
  const char* wish = std::getenv("LIC_FAST_SIMD");
  const bool generic_only = wish && !std::strcmp(wish, "generic");
  const bool no_avx512 = wish && !std::strcmp(wish, "avx2");
  __builtin_cpu_init();
  if (!generic_only && !no_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return avx512;
  }
  if (!generic_only && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2;
  }
#else
  (void)avx2, (void)avx512;
#endif
  return generic;
}

}  // namespace lic_fast

#define LIC_FAST_SIMD_VARIANTS(name, parameters, arguments)                                                            \
  static void name##_generic parameters { name##_body<::lic_fast::Generic> arguments; }                                \
  LIC_FAST_TARGET(LIC_FAST_AVX2) static void name##_avx2 parameters { name##_body<::lic_fast::Avx2> arguments; }       \
  LIC_FAST_TARGET(LIC_FAST_AVX512) static void name##_avx512 parameters { name##_body<::lic_fast::Avx512> arguments; } \
  static const auto name = ::lic_fast::select_simd(name##_generic, name##_avx2, name##_avx512)
