// The part of cholesky.h that depends on the instruction set: included by it once for each, inside the namespaces of
// gemm_kernel.h, whose vectors and macros it uses. No include guard, on purpose.

// Rows i of C [m, N vectors] <- C - A B, or (C - A B) U with U upper triangular, kRows at a time, in registers over the
// whole sum. A is row-major and not packed: the panels of a factorisation are narrow, and A was written just before.
// m is rounded up to whole tiles.
template <class T, int kVectors, bool kSolve>
LIC_FAST_GEMM_ISA void panel_rows(int64_t m, int64_t depth, const T* a_first, int64_t lda, const T* b_first,
                                  const T* triangle, T* c_first, int64_t ldc) {
  using V = typename Vector<T>::type;
  constexpr int kLanes = Vector<T>::kLanes, kWidth = kVectors * kLanes;
  alignas(64) T difference[kRows][kWidth];
  for (int64_t i = 0; i < m; i += kRows) {
    V sum[kRows][kVectors] = {};
    const T *a = a_first + i * lda, *b = b_first;
    T* c = c_first + i * ldc;
    for (int64_t k = 0; k < depth; ++k, ++a, b += kWidth) {
      V right[kVectors];
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) right[j] = load(b + j * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
        for (int j = 0; j < kVectors; ++j) sum[r][j] = multiply_add(a[r * lda], right[j], sum[r][j]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) {
        const V left = load(c + r * ldc + j * kLanes) - sum[r][j];
        store(kSolve ? &difference[r][j * kLanes] : c + r * ldc + j * kLanes, left);
        sum[r][j] = V{};
      }
    }
    if constexpr (!kSolve) continue;
#pragma GCC unroll 3
    for (int first = 0; first < kVectors; ++first) {  // rows of U that begin in this vector
      for (int k = first * kLanes; k < (first + 1) * kLanes; ++k) {
        V right[kVectors];
#pragma GCC unroll 3
        for (int j = first; j < kVectors; ++j) right[j] = load(triangle + k * kWidth + j * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
          for (int j = first; j < kVectors; ++j) sum[r][j] = multiply_add(difference[r][k], right[j], sum[r][j]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) store(c + r * ldc + j * kLanes, sum[r][j]);
    }
  }
}

// s [width, width], width = kVectors * lanes, of which the upper triangle is read: s = L L^T, inverse = L^-T with zeros
// below its diagonal. False where a pivot is not positive and finite. The same elimination takes the identity to L^-1,
// which fills the time that the chain of square roots and divisions leaves.
template <class T, int kVectors>
LIC_FAST_GEMM_ISA bool factor_block(T* s, T* inverse) {
  using V = typename Vector<T>::type;
  constexpr int kLanes = Vector<T>::kLanes, kWidth = kVectors * kLanes;
  alignas(64) T other[kWidth * kWidth] = {};
  for (int k = 0; k < kWidth; ++k) other[k * kWidth + k] = T(1);
  bool good = true;
#pragma GCC unroll 3
  for (int first = 0; first < kVectors; ++first) {
    for (int k = first * kLanes; k < (first + 1) * kLanes; ++k) {
      T* row = s + k * kWidth;
      good = good && row[k] > 0 && row[k] <= std::numeric_limits<T>::max();
      const T scale = T(1) / std::sqrt(row[k]);
      V x[kVectors], y[kVectors];
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) {
        if (j >= first) store(row + j * kLanes, x[j] = load(row + j * kLanes) * scale);
        T* to = other + k * kWidth + j * kLanes;
        if (j <= first) store(to, y[j] = load(to) * scale);
      }
      for (int i = k + 1; i < kWidth; ++i) {
        const T minus = -row[i];
#pragma GCC unroll 3
        for (int j = 0; j < kVectors; ++j) {
          T *left = s + i * kWidth + j * kLanes, *right = other + i * kWidth + j * kLanes;
          if (j >= first) store(left, multiply_add(minus, x[j], load(left)));
          if (j <= first) store(right, multiply_add(minus, y[j], load(right)));
        }
      }
    }
  }
  transpose<T, kLanes>(other, kWidth, kWidth, kWidth, inverse, kWidth);
  return good;
}

template <class T>
const CholeskyKernels<T>& cholesky_table() {
  static const CholeskyKernels<T> table = {kRows,
                                           Vector<T>::kLanes,
                                           {panel_rows<T, 1, false>, panel_rows<T, 2, false>, panel_rows<T, 3, false>},
                                           {panel_rows<T, 1, true>, panel_rows<T, 2, true>, panel_rows<T, 3, true>},
                                           {factor_block<T, 1>, factor_block<T, 2>, factor_block<T, 3>}};
  return table;
}
