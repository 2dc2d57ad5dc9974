// The part of gemm.h that depends on the instruction set: included once for each, inside its own namespace, by gemm.h.
// LIC_FAST_GEMM_ISA is the attribute of its functions; LIC_FAST_GEMM_BYTES the width of a vector, LIC_FAST_GEMM_ROWS
// the rows of a tile. No include guard, on purpose.
//
// A tile is kRows x (1 to 3 vectors) of C, kept in registers: 8 x 48 fp32 on AVX-512 (24 of 32 registers), 4 x 24 on
// AVX2 (12 of 16). Each step over k loads 3 vectors of B and broadcasts kRows elements of A: fewer loads than multiply-
// adds, and more independent sums than the latency of a multiply-add needs. kRows divides the three vectors, so that a
// matrix packed as B can also be read as A (symmetric products).

template <class T, int kCount = LIC_FAST_GEMM_BYTES / sizeof(T)>
struct Vector {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
  typedef T loose __attribute__((vector_size(kCount * sizeof(T)), aligned(sizeof(T)), may_alias));
  static constexpr int kLanes = kCount;
};
constexpr int kRows = LIC_FAST_GEMM_ROWS;

template <class T, int kCount = Vector<T>::kLanes>
LIC_FAST_GEMM_ISA LIC_FAST_INLINE typename Vector<T, kCount>::type load(const T* from) {
  return *reinterpret_cast<const typename Vector<T, kCount>::loose*>(from);
}

template <class T, int kCount = Vector<T>::kLanes>
LIC_FAST_GEMM_ISA LIC_FAST_INLINE void store(T* to, typename Vector<T, kCount>::type value) {
  *reinterpret_cast<typename Vector<T, kCount>::loose*>(to) = value;
}

// c + a * b, fused where the instruction set can.
template <class T, class V>
LIC_FAST_GEMM_ISA LIC_FAST_INLINE V multiply_add(T a, V b, V c) {
#if LIC_FAST_GEMM_BYTES == 64
  if constexpr (sizeof(T) == 4) return (V)_mm512_fmadd_ps(_mm512_set1_ps(a), (__m512)b, (__m512)c);
  if constexpr (sizeof(T) == 8) return (V)_mm512_fmadd_pd(_mm512_set1_pd(a), (__m512d)b, (__m512d)c);
#elif LIC_FAST_GEMM_BYTES == 32
  if constexpr (sizeof(T) == 4) return (V)_mm256_fmadd_ps(_mm256_set1_ps(a), (__m256)b, (__m256)c);
  if constexpr (sizeof(T) == 8) return (V)_mm256_fmadd_pd(_mm256_set1_pd(a), (__m256d)b, (__m256d)c);
#else
  return c + b * a;
#endif
}

// The first n lanes of *to <- alpha * sum + beta * *to; beta == 0 does not read.
template <class T, class V>
LIC_FAST_GEMM_ISA LIC_FAST_INLINE void update_part(T* to, V sum, T alpha, T beta, int64_t n) {
  T lanes[Vector<T>::kLanes];
  store(lanes, sum);
  for (int64_t i = 0; i < n; ++i) to[i] = beta == 0 ? alpha * lanes[i] : alpha * lanes[i] + beta * to[i];
}

// C [rows, columns] <- alpha * A B + beta * C. A: k-major, a_step elements from one k to the next; B: likewise, with
// kVectors whole vectors a step. rows <= kRows, (kVectors - 1) * lanes < columns <= kVectors * lanes.
template <class T, int kVectors>
LIC_FAST_GEMM_ISA void tile(int64_t depth, const T* a, int64_t a_step, const T* b, int64_t b_step, T alpha, T beta,
                            T* c, int64_t ldc, int64_t rows, int64_t columns) {
  using V = typename Vector<T>::type;
  constexpr int kLanes = Vector<T>::kLanes;
  V sum[kRows][kVectors] = {};
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(c + i * ldc + j, 1);
  }
  for (int64_t k = 0; k < depth; ++k) {
    V right[kVectors];
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) right[j] = load(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) sum[i][j] = multiply_add(a[i], right[j], sum[i][j]);
    }
    a += a_step;
    b += b_step;
  }
  const bool whole = columns == kVectors * kLanes;
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    if (i >= rows) break;
    T* row = c + i * ldc;
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) {
      T* to = row + j * kLanes;
      if (j == kVectors - 1 && !whole) {
        update_part(to, sum[i][j], alpha, beta, columns - j * kLanes);
      } else if (beta == 0) {
        store(to, sum[i][j] * alpha);
      } else {
        store(to, sum[i][j] * alpha + load(to) * beta);
      }
    }
  }
}

// Interleaves two vectors: lanes kFirst, kFirst + 1, ... of a and b in turn.
template <int kFirst, class V, int... kLane>
LIC_FAST_GEMM_ISA LIC_FAST_INLINE V zip(V a, V b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (kFirst + kLane / 2 + (kLane % 2) * static_cast<int>(sizeof...(kLane)))...);
}

// to[k * to_step + i] = from[i * from_step + k] for a square of kLanes a side: log2(lanes) rounds of interleaving.
template <class T, int kLanes>
LIC_FAST_GEMM_ISA LIC_FAST_INLINE void transpose_square(const T* from, int64_t from_step, T* to, int64_t to_step) {
  using V = typename Vector<T, kLanes>::type;
  constexpr int kHalf = kLanes / 2;
  constexpr auto kAll = std::make_integer_sequence<int, kLanes>();
  V now[kLanes], next[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) now[i] = load<T, kLanes>(from + i * from_step);
#pragma GCC unroll 4
  for (int span = 1; span < kLanes; span *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) {
      next[2 * i] = zip<0>(now[i], now[i + kHalf], kAll);
      next[2 * i + 1] = zip<kHalf>(now[i], now[i + kHalf], kAll);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) now[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store<T, kLanes>(to + i * to_step, now[i]);
}

// to[k * to_step + i] = from[i * from_step + k] for i < n, k < depth.
template <class T, int kLanes>
LIC_FAST_GEMM_ISA void transpose(const T* from, int64_t from_step, int64_t n, int64_t depth, T* to, int64_t to_step) {
  const int64_t n_whole = n - n % kLanes, depth_whole = depth - depth % kLanes;
  for (int64_t i = 0; i < n_whole; i += kLanes) {
    for (int64_t k = 0; k < depth_whole; k += kLanes) {
      transpose_square<T, kLanes>(from + i * from_step + k, from_step, to + k * to_step + i, to_step);
    }
  }
  for (int64_t k = 0; k < depth_whole; ++k) {
    for (int64_t i = n_whole; i < n; ++i) to[k * to_step + i] = from[i * from_step + k];
  }
  for (int64_t k = depth_whole; k < depth; ++k) {
    for (int64_t i = 0; i < n; ++i) to[k * to_step + i] = from[i * from_step + k];
  }
}

template <class T, int kWidth>
LIC_FAST_GEMM_ISA void copy_panel(const T* from, int64_t from_step, int64_t depth, T* to) {
  for (int64_t k = 0; k < depth; ++k) std::memcpy(to + k * kWidth, from + k * from_step, kWidth * sizeof(T));
}

// Packs panels of kWidth: panel p holds to[(p * depth + k) * kWidth + i] = from[(p * kWidth + i) * step + k * k_step],
// the last one filled up with zeros.
template <class T, int kWidth>
LIC_FAST_GEMM_ISA void pack(const T* from, int64_t step, int64_t k_step, int64_t n, int64_t depth, T* to) {
  constexpr bool kHalf = kWidth % Vector<T>::kLanes != 0;  // panels of A narrower than a vector
  constexpr int kSide = !kHalf ? Vector<T>::kLanes : (kWidth & (kWidth - 1)) == 0 ? kWidth : 0;
  for (int64_t first = 0; first < n; first += kWidth, to += depth * kWidth, from += kWidth * step) {
    const int64_t width = std::min<int64_t>(kWidth, n - first);
    if (width == kWidth && step == 1) {
      copy_panel<T, kWidth>(from, k_step, depth, to);
      continue;
    }
    if (width < kWidth) std::fill_n(to, depth * kWidth, T(0));
    if constexpr (kSide > 0) {
      if (k_step == 1) {
        transpose<T, kSide>(from, step, width, depth, to, kWidth);
        continue;
      }
    }
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t i = 0; i < width; ++i) to[k * kWidth + i] = from[i * step + k * k_step];
    }
  }
}

template <class T>
const GemmKernels<T>& kernels() {
  constexpr int kLanes = Vector<T>::kLanes;
  static_assert(3 * kLanes % kRows == 0, "a panel of B is read as panels of A");
  static const GemmKernels<T> table = {
      kRows, kLanes, {tile<T, 1>, tile<T, 2>, tile<T, 3>}, pack<T, kRows>, pack<T, 3 * kLanes>, transpose<T, kLanes>};
  return table;
}
