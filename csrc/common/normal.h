// Standard normal numbers from the uniform ones of common/philox.h, by the inverse of the distribution: the formulas of
// lic_fast/reference/_noise.py, in sums, products and bits of fp32 alone. Every operation is rounded by itself, so that
// all backends give the same bits.
#pragma once

#include <cstring>

#include "common/philox.h"

namespace lic_fast {

LIC_FAST_ANYWHERE float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

LIC_FAST_ANYWHERE float rounded_sum(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

LIC_FAST_ANYWHERE float rounded_horner(float, float last) { return last; }
template <class... Rest>
LIC_FAST_ANYWHERE float rounded_horner(float x, float first, Rest... rest) {  // from the constant term on
  return rounded_sum(rounded_product(rounded_horner(x, rest...), x), first);
}

LIC_FAST_ANYWHERE float float_of(int32_t bits) {
#ifdef __CUDA_ARCH__
  return __int_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

LIC_FAST_ANYWHERE int32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_int(value);
#else
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

// The normal number of u, uniform in (-0.5, 0.5).
LIC_FAST_ANYWHERE float normal_of(float u) {
  const float x = 2.0f * u;
  const float t = 1.0f - (x < 0.0f ? -x : x);
  const int32_t bits = bits_of(rounded_product(t, 2.0f - t));  // of 1 - x^2
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;
  const float f = float_of(bits - static_cast<int32_t>(static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  const float log_part =
      rounded_horner(f, 1.442694902420044f, -0.7213528156280518f, 0.48092323541641235f, -0.3602396249771118f,
                     0.28709882497787476f, -0.2488771378993988f, 0.23404155671596527f, -0.14580978453159332f);
  const float log2 = rounded_sum(static_cast<float>(exponent), rounded_product(f, log_part));
  const float v = rounded_sum(rounded_product(log2, static_cast<float>(-1.0 / 11.5)), -1.0f);
  return rounded_product(
      x, rounded_horner(v, 3.7566518783569336f, 1.9913569688796997f, -0.45618733763694763f, 0.17676332592964172f,
                        -0.050427135080099106f, -0.02488126792013645f, 0.05982644483447075f, -0.05564600229263306f,
                        0.04564310982823372f, -0.04216134175658226f, -0.0008689965470694005f, 0.05037187412381172f,
                        -0.02765994891524315f, -0.012469040229916573f, 0.009670699015259743f));
}

}  // namespace lic_fast
