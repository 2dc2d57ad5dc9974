// Matrix products for one thread, fp32 and fp64, of the sizes that SOAP's factors have (3 to a few thousand):
//     gemm:       C <- alpha A B + beta C                     (C row-major; A and B with any strides)
//     gemm_rows:  the same, with a watcher that is called as blocks of C come and go (an epilogue in cache)
//     symmetric:  C <- beta C + alpha A A^T                    (lower triangle only; mirror() completes it)
// A block of B [depth, N] is packed once into panels of three vectors (kBlockBytes: half of an L2 cache), then A in
// blocks of kBlockRows rows; a tile of C stays in registers over kDepth steps, its panel of B in L1. Sums run over k in
// a fixed order that depends on the sizes alone; they differ between instruction sets by rounding. NaN and infinities
// go where arithmetic carries them, except that beta == 0 does not read C.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "cpu/simd.h"

namespace lic_fast {

// Scratch of one thread, kept between calls; each slot grows to the most it was asked for. Contents are not kept.
class Workspace {
 public:
  enum Slot { kPackedA, kPackedB, kFirstFree };

  template <class T>
  T* get(int slot, int64_t count) {
    Buffer& buffer = buffers_[slot];
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) / 4096 + 2) * 4096;
    if (bytes > buffer.size) {
      buffer.data.reset();
      buffer.size = 0;
      buffer.data.reset(std::aligned_alloc(4096, bytes));
      if (!buffer.data) throw std::bad_alloc();
      buffer.size = bytes;
    }
#ifdef LIC_FAST_POISON
    std::memset(buffer.data.get(), 0xFF, bytes);
#endif
    return static_cast<T*>(buffer.data.get());
  }

 private:
  struct Free {
    void operator()(void* data) const { std::free(data); }
  };
  struct Buffer {
    std::unique_ptr<void, Free> data;
    size_t size = 0;
  };
  Buffer buffers_[16];
};

template <class T>
struct GemmKernels {
  int64_t rows, lanes;  // of a tile, of a vector; a panel of B is three vectors wide
  void (*tile[3])(int64_t depth, const T* a, int64_t a_step, const T* b, int64_t b_step, T alpha, T beta, T* c,
                  int64_t ldc, int64_t rows, int64_t columns);  // of 1, 2 or 3 vectors
  void (*pack_a)(const T* from, int64_t step, int64_t k_step, int64_t n, int64_t depth, T* to);
  void (*pack_b)(const T* from, int64_t step, int64_t k_step, int64_t n, int64_t depth, T* to);
  void (*transpose)(const T* from, int64_t from_step, int64_t n, int64_t depth, T* to, int64_t to_step);
};

namespace gemm_generic {
#define LIC_FAST_GEMM_ISA
#define LIC_FAST_GEMM_BYTES 16
#define LIC_FAST_GEMM_ROWS 3
#include "cpu/gemm_kernel.h"
#undef LIC_FAST_GEMM_ISA
#undef LIC_FAST_GEMM_BYTES
#undef LIC_FAST_GEMM_ROWS
}  // namespace gemm_generic

#if defined(__x86_64__)
namespace gemm_avx2 {
#define LIC_FAST_GEMM_ISA LIC_FAST_TARGET(LIC_FAST_AVX2)
#define LIC_FAST_GEMM_BYTES 32
#define LIC_FAST_GEMM_ROWS 4
#include "cpu/gemm_kernel.h"
#undef LIC_FAST_GEMM_ISA
#undef LIC_FAST_GEMM_BYTES
#undef LIC_FAST_GEMM_ROWS
}  // namespace gemm_avx2

namespace gemm_avx512 {
#define LIC_FAST_GEMM_ISA LIC_FAST_TARGET(LIC_FAST_AVX512)
#define LIC_FAST_GEMM_BYTES 64
#define LIC_FAST_GEMM_ROWS 8
#include "cpu/gemm_kernel.h"
#undef LIC_FAST_GEMM_ISA
#undef LIC_FAST_GEMM_BYTES
#undef LIC_FAST_GEMM_ROWS
}  // namespace gemm_avx512
#else
namespace gemm_avx2 = gemm_generic;
namespace gemm_avx512 = gemm_generic;
#endif

template <class T>
const GemmKernels<T>& gemm_kernels() {
  static const GemmKernels<T>& best =
      select_simd(gemm_generic::kernels<T>, gemm_avx2::kernels<T>, gemm_avx512::kernels<T>)();
  return best;
}

namespace gemm_detail {

constexpr int64_t kDepth = 256, kBlockRows = 96, kBlockColumns = 1536;  // of 48, 24, 12 and 6 a multiple each
constexpr int64_t kBlockBytes = 512 << 10;

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t even_part(int64_t n, int64_t most) {  // the longest of the fewest equal parts
  return n <= most ? n : divide_up(n, divide_up(n, most));
}

// One block of A (packed, [rows, depth]) by all panels of B (packed, [depth, columns]).
template <class T, class Watch>
void block_times_panels(const GemmKernels<T>& use, int64_t rows, int64_t columns, int64_t depth, const T* a, const T* b,
                        T alpha, T beta, T* c, int64_t ldc, const Watch& ahead) {
  const int64_t width = 3 * use.lanes;
  for (int64_t j = 0; j < columns; j += width) {
    const int64_t n = std::min(width, columns - j);
    const auto tile = use.tile[(n - 1) / use.lanes];
    for (int64_t i = 0; i < rows; i += use.rows) {
      ahead(i, std::min(i + use.rows, rows), j, j + n);
      tile(depth, a + i * depth, use.rows, b + j * depth, width, alpha, beta, c + i * ldc + j, ldc,
           std::min(use.rows, rows - i), n);
    }
  }
}

}  // namespace gemm_detail

// Watches a product, and does nothing. ahead(i, i_end, j, j_end): that tile of C is about to be worked on, the first
// time where K has several blocks (to prefetch what finished() will read); finished(...): that block of C has its
// values.
struct NoWatcher {
  void ahead(int64_t, int64_t, int64_t, int64_t) const {}
  void finished(int64_t, int64_t, int64_t, int64_t) const {}
};

template <class T, class Watcher>
void gemm_rows(int64_t M, int64_t N, int64_t K, T alpha, const T* a, int64_t a_row, int64_t a_col, const T* b,
               int64_t b_row, int64_t b_col, T beta, T* c, int64_t ldc, Workspace& workspace, const Watcher& watcher) {
  using namespace gemm_detail;
  const GemmKernels<T>& use = gemm_kernels<T>();
  const int64_t width = 3 * use.lanes, depth_step = std::max<int64_t>(1, even_part(K, kDepth));
  for (int64_t j = 0; j < N; j += kBlockColumns) {
    const int64_t n = std::min(kBlockColumns, N - j), n_packed = divide_up(n, width) * width;
    const int64_t fit = kBlockBytes / (n_packed * static_cast<int64_t>(sizeof(T)));
    const int64_t depth_block = std::max<int64_t>(1, fit / depth_step) * depth_step;
    T* packed_b = workspace.get<T>(Workspace::kPackedB, n_packed * std::min(depth_block, std::max<int64_t>(K, 1)));
    T* packed_a = workspace.get<T>(Workspace::kPackedA, (std::min(M, kBlockRows) + use.rows) * depth_step);
    int64_t k = 0;
    do {  // once even where K == 0, to scale C
      const int64_t k_end = std::min(K, k + depth_block);
      for (int64_t p = k; p < k_end; p += depth_step) {
        const int64_t depth = std::min(depth_step, k_end - p);
        use.pack_b(b + j * b_col + p * b_row, b_col, b_row, n, depth, packed_b + (p - k) * n_packed);
      }
      for (int64_t i = 0; i < M; i += kBlockRows) {
        const int64_t m = std::min(kBlockRows, M - i);
        int64_t p = k;
        do {
          const int64_t depth = std::min(depth_step, k_end - p);
          use.pack_a(a + i * a_row + p * a_col, a_row, a_col, m, depth, packed_a);
          block_times_panels(use, m, n, depth, packed_a, packed_b + (p - k) * n_packed, alpha, p == 0 ? beta : T(1),
                             c + i * ldc + j, ldc, [&](int64_t r, int64_t r_end, int64_t s, int64_t s_end) {
                               if (p == 0) watcher.ahead(i + r, i + r_end, j + s, j + s_end);
                             });
          p += depth_step;
        } while (p < k_end);
        if (k_end == K) watcher.finished(i, i + m, j, j + n);
      }
      k = k_end;
    } while (k < K);
  }
}

// C [M, N] row-major, ldc elements a row: C = alpha A B + beta C. Element (i, k) of A lies at a[i * a_row + k * a_col],
// (k, j) of B at b[k * b_row + j * b_col]. beta == 0 never reads C, which must not overlap A or B.
template <class T>
void gemm(int64_t M, int64_t N, int64_t K, T alpha, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row,
          int64_t b_col, T beta, T* c, int64_t ldc, Workspace& workspace) {
  gemm_rows(M, N, K, alpha, a, a_row, a_col, b, b_row, b_col, beta, c, ldc, workspace, NoWatcher());
}

// C [N, N] = alpha A A^T + beta C in the lower triangle; above it, what a tile happens to cover is overwritten with
// unspecified values. A [N, K] as in gemm. mirror() makes it whole after the last call.
template <class T>
void symmetric(int64_t N, int64_t K, T alpha, const T* a, int64_t a_row, int64_t a_col, T beta, T* c, int64_t ldc,
               Workspace& workspace) {
  using namespace gemm_detail;
  const GemmKernels<T>& use = gemm_kernels<T>();
  const int64_t width = 3 * use.lanes, n_packed = divide_up(N, width) * width;
  const int64_t most = std::clamp<int64_t>(kBlockBytes / (n_packed * static_cast<int64_t>(sizeof(T))), 64, kDepth);
  const int64_t depth_step = std::max<int64_t>(1, even_part(K, most));
  T* packed = workspace.get<T>(Workspace::kPackedB, n_packed * depth_step);
  int64_t k = 0;
  do {
    const int64_t depth = std::min(depth_step, K - k);
    use.pack_b(a + k * a_col, a_row, a_col, N, depth, packed);
    for (int64_t j = 0; j < N; j += width) {
      for (int64_t i = j; i < N; i += use.rows) {
        const int64_t m = std::min(use.rows, N - i), n = std::min(std::min(width, N - j), i + m - j);
        const T* rows = packed + (i / width) * width * depth + i % width;
        use.tile[(n - 1) / use.lanes](depth, rows, width, packed + j * depth, width, alpha, k == 0 ? beta : T(1),
                                      c + i * ldc + j, ldc, m, n);
      }
    }
    k += depth_step;
  } while (k < K);
}

// Copies the lower triangle of C [N, N] to the upper one.
template <class T>
void mirror(int64_t N, T* c, int64_t ldc) {
  const GemmKernels<T>& use = gemm_kernels<T>();
  constexpr int64_t kSide = 32;
  for (int64_t i = 0; i < N; i += kSide) {
    const int64_t m = std::min(kSide, N - i);
    for (int64_t j = 0; j < i; j += kSide) use.transpose(c + i * ldc + j, ldc, m, kSide, c + j * ldc + i, ldc);
    for (int64_t r = i; r < i + m; ++r) {
      for (int64_t s = i; s < r; ++s) c[s * ldc + r] = c[r * ldc + s];
    }
  }
}

}  // namespace lic_fast
