// Cholesky's factorisation and the triangular solve of Cholesky-QR in one sweep, for one thread:
//     G = L L^T (lower triangles, G is overwritten),  W <- W L^-T
// Left-looking. Blocks of kBlock columns take in all columns before them with one gemm for G and one for W. Within a
// block, panels of three vectors of columns: the panel's rows of L are packed transposed as B, then
//     S = G_jj - L_j B,  S = L_jj L_jj^T,  U = L_jj^-T     (on the diagonal, in L1)
//     X = (C - A B) U                                      (rows of G below it, and all rows of W: one pass)
// so that a row of X is read, summed, solved and written once a panel. Inverting the diagonal blocks costs accuracy
// only where they are nearly singular themselves, and then Cholesky-QR loses more by squaring the condition.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/gemm.h"

namespace lic_fast {

template <class T>
struct CholeskyKernels {
  using Rows = void (*)(int64_t m, int64_t depth, const T* a, int64_t lda, const T* b, const T* triangle, T* c,
                        int64_t ldc);
  int64_t rows, lanes;
  Rows subtract[3], solve[3];  // of 1, 2 or 3 vectors
  bool (*factor[3])(T* s, T* inverse);
};

namespace gemm_generic {
#define LIC_FAST_GEMM_ISA
#define LIC_FAST_GEMM_BYTES 16
#include "cpu/cholesky_kernel.h"
#undef LIC_FAST_GEMM_ISA
#undef LIC_FAST_GEMM_BYTES
}  // namespace gemm_generic

#if defined(__x86_64__)
namespace gemm_avx2 {
#define LIC_FAST_GEMM_ISA LIC_FAST_TARGET(LIC_FAST_AVX2)
#define LIC_FAST_GEMM_BYTES 32
#include "cpu/cholesky_kernel.h"
#undef LIC_FAST_GEMM_ISA
#undef LIC_FAST_GEMM_BYTES
}  // namespace gemm_avx2

namespace gemm_avx512 {
#define LIC_FAST_GEMM_ISA LIC_FAST_TARGET(LIC_FAST_AVX512)
#define LIC_FAST_GEMM_BYTES 64
#include "cpu/cholesky_kernel.h"
#undef LIC_FAST_GEMM_ISA
#undef LIC_FAST_GEMM_BYTES
}  // namespace gemm_avx512
#endif

template <class T>
const CholeskyKernels<T>& cholesky_kernels() {
  static const CholeskyKernels<T>& best =
      select_simd(gemm_generic::cholesky_table<T>, gemm_avx2::cholesky_table<T>, gemm_avx512::cholesky_table<T>)();
  return best;
}

constexpr int64_t kCholeskyBlock = 384;  // columns, a multiple of every panel; its part of L stays in cache
constexpr int64_t kMostWidth = 48;       // of a panel: three vectors of 16 fp32

// Rows and elements a row of the storage for a [n, n] operand of factor_and_solve.
inline int64_t padded_rows(int64_t n) { return n + kMostWidth; }
inline int64_t padded_step(int64_t n) {
  const int64_t step = (n + 15) / 16 * 16;
  return step % 32 == 0 ? step + 16 : step;  // no power of two between rows, which would share a set of the cache
}

// G [n, n], of which the lower triangle is read, and W [m, n], both with padding that is zero: columns from n to step,
// and kMostWidth rows. False, with both half overwritten, where a pivot is not positive and finite.
template <class T>
bool factor_and_solve(int64_t n, T* g, int64_t g_step, int64_t m, T* w, int64_t w_step, int slot,
                      Workspace& workspace) {
  using namespace gemm_detail;
  const CholeskyKernels<T>& use = cholesky_kernels<T>();
  const auto transpose = gemm_kernels<T>().transpose;
  const int64_t width = 3 * use.lanes, block = divide_up(even_part(n, kCholeskyBlock), width) * width;
  T* s = workspace.get<T>(slot, (2 * width + block) * width);
  T *inverse = s + width * width, *packed = inverse + width * width;
  for (int64_t j = 0; j < n; j += block) {
    const int64_t j_end = std::min(n, j + block);
    const T* above = g + j * g_step;  // rows of L, whose transpose multiplies what is left of them
    if (j > 0) {
      gemm<T>(n - j, j_end - j, j, T(-1), above, g_step, 1, above, 1, g_step, T(1), g + j * g_step + j, g_step,
              workspace);
      gemm<T>(m, j_end - j, j, T(-1), w, w_step, 1, above, 1, g_step, T(1), w + j, w_step, workspace);
    }
    for (int64_t p = j; p < j_end; p += width) {
      const int64_t count = std::min(width, j_end - p), depth = p - j, below = n - p - count;
      const int64_t vectors = divide_up(count, use.lanes), side = vectors * use.lanes;
      const T* rows = g + p * g_step + j;
      T* diagonal = g + p * g_step + p;
      transpose(rows, g_step, side, depth, packed, side);
      use.subtract[vectors - 1](side, depth, rows, g_step, packed, nullptr, diagonal, g_step);
      transpose(diagonal, g_step, side, side, s, side);
      for (int64_t i = count; i < side; ++i) s[i * side + i] = T(1);
      if (!use.factor[vectors - 1](s, inverse)) return false;
      use.solve[vectors - 1](below, depth, rows + count * g_step, g_step, packed, inverse, diagonal + count * g_step,
                             g_step);
      use.solve[vectors - 1](m, depth, w + j, w_step, packed, inverse, w + p, w_step);
    }
  }
  return true;
}

}  // namespace lic_fast
