// Horner's rule for the policies of arithmetic (cpu/vector_math.h, and the CUDA kernels' own).
#pragma once

#include "common/philox.h"

namespace lic_fast {

// first + x * (second + x * (...)).
template <class M>
LIC_FAST_ANYWHERE typename M::Value polynomial(typename M::Value, typename M::Scalar last) {
  return M::all(last);
}
template <class M, class... Rest>
LIC_FAST_ANYWHERE typename M::Value polynomial(typename M::Value x, typename M::Scalar first, Rest... rest) {
  return polynomial<M>(x, static_cast<typename M::Scalar>(rest)...) * x + first;
}

}  // namespace lic_fast
