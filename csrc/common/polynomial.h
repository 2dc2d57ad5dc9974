// Polynomials for the policies of arithmetic (cpu/vector_math.h, and the CUDA kernels' own).
#pragma once

#include "common/choose.h"

namespace lic_fast {

// coefficients[0] + x (coefficients[1] + x (...)), by Estrin's scheme: neighbours are joined in pairs, the pairs with
// x^2 and so on, so that the chain of dependent operations is as long as the logarithm of the degree.
template <class M, class... Rest>
LIC_FAST_ANYWHERE typename M::Value polynomial(typename M::Value x, typename M::Scalar first, Rest... rest) {
  constexpr int kTerms = 1 + sizeof...(rest);
  const typename M::Scalar coefficients[] = {first, static_cast<typename M::Scalar>(rest)...};
  typename M::Value terms[(kTerms + 1) / 2];
  LIC_FAST_UNROLL
  for (int i = 0; i + 1 < kTerms; i += 2) {
    terms[i / 2] = M::fused(x, M::all(coefficients[i + 1]), M::all(coefficients[i]));
  }
  if (kTerms % 2) terms[kTerms / 2] = M::all(coefficients[kTerms - 1]);
  typename M::Value power = x;
  LIC_FAST_UNROLL
  for (int n = (kTerms + 1) / 2; n > 1; n = (n + 1) / 2) {
    power = power * power;
    LIC_FAST_UNROLL
    for (int i = 0; i + 1 < n; i += 2) terms[i / 2] = M::fused(terms[i + 1], power, terms[i]);
    if (n % 2) terms[n / 2] = terms[n - 1];
  }
  return terms[0];
}

}  // namespace lic_fast
