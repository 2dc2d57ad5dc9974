// A weight seen as planes: taps x [rows, columns], the last two axes of a view and all the axes before them. The axes
// are 1 to 5; 1-D has one row, and up to 2-D one tap. Kernels work on contiguous planes [taps, rows, columns].
//
// project: every axis multiplied by its basis (transposed, or as it is: back). The tap axes are small (3, 5): in one
// pass over the planes, a chunk of kChunk elements of every plane is loaded, mixed axis by axis in L1, and stored; the
// same pass sums the tap axes' Gram matrices. Rows and columns are matrix products (gemm.h); a single row takes loops
// that read the basis once.
#pragma once

#include "cpu/optim.h"

namespace lic_fast {

constexpr int64_t kChunk = 64, kSumLanes = 16;
constexpr int kScratchSlot = Workspace::kFirstFree, kSumSlot = kScratchSlot + 1, kPlanesSlot = kScratchSlot + 2;

struct Axis {
  int64_t size;
  const void* basis;  // [size, size], or null
  void* factor;       // [size, size], or null
};

struct Planes {
  int64_t taps = 1, rows = 1, columns = 1;
  std::vector<Axis> axes;  // as many as the view has

  int64_t plane() const { return rows * columns; }
  int64_t numel() const { return taps * plane(); }
  size_t tap_axes() const { return axes.size() < 2 ? 0 : axes.size() - 2; }
  const Axis* row_axis() const { return axes.size() < 2 ? nullptr : &axes[axes.size() - 2]; }
  const Axis& column_axis() const { return axes.back(); }

  void add_axis(int64_t size) {
    if (!axes.empty()) taps *= rows, rows = columns;
    columns = size;
    axes.push_back({size, nullptr, nullptr});
  }
  // Multiply-adds of an update, for the queue: two products an axis that has a basis, half of one for its factor.
  double cost() const {
    double sum = 20;
    for (const Axis& axis : axes)
      sum += static_cast<double>(axis.size) * ((axis.basis ? 2 : 0) + (axis.factor ? 1 : 0));
    return sum * static_cast<double>(numel());
  }
};

inline bool is_square(const Tensor& matrix, int64_t size, int32_t code) {
  return matrix.is_cpu() && dtype_code(matrix) == code && matrix.dim() == 2 && matrix.size(0) == size &&
         matrix.size(1) == size && matrix.is_contiguous();
}

namespace {

struct TapPass {
  const Planes* planes;
  const void* from;  // contiguous planes
  void* to;          // likewise, may be from; null: Gram matrices only
  void* scratch;     // 2 * taps * kChunk elements
  double* sums;      // null, or gram_sums() elements: [size, size] of every tap axis that has a factor
  void* lanes;       // kSumLanes * gram_sums() elements
  bool back;
};

inline int64_t gram_sums(const Planes& planes) {
  int64_t count = 0;
  for (size_t a = 0; a < planes.tap_axes(); ++a) {
    if (planes.axes[a].factor) count += planes.axes[a].size * planes.axes[a].size;
  }
  return count;
}

// y[j] = sum over i of w[j, i] x[i]; planes i and j of a chunk lie step elements apart.
template <class T, int kSize>
LIC_FAST_INLINE void mix_group(const T* __restrict__ x, T* __restrict__ y, int64_t step, const T* w, int64_t) {
  for (int64_t e = 0; e < kChunk; ++e) {
    T values[kSize];
    for (int i = 0; i < kSize; ++i) values[i] = x[i * step + e];
    for (int j = 0; j < kSize; ++j) {
      T sum = w[j * kSize] * values[0];
      for (int i = 1; i < kSize; ++i) sum += w[j * kSize + i] * values[i];
      y[j * step + e] = sum;
    }
  }
}

template <class T>
LIC_FAST_INLINE void mix_any(const T* __restrict__ x, T* __restrict__ y, int64_t step, const T* q, int64_t size,
                             bool back) {
  for (int64_t j = 0; j < size; ++j) {
    T sum[kChunk] = {};
    for (int64_t i = 0; i < size; ++i) {
      const T weight = back ? q[j * size + i] : q[i * size + j];
      for (int64_t e = 0; e < kChunk; ++e) sum[e] += weight * x[i * step + e];
    }
    for (int64_t e = 0; e < kChunk; ++e) y[j * step + e] = sum[e];
  }
}

// One tap axis of a chunk [taps, kChunk]: inner is the product of the tap axes after it.
template <class T>
LIC_FAST_INLINE void mix_axis(const T* from, T* to, int64_t taps, int64_t size, int64_t inner, const T* q, bool back) {
  T w[25];
  if (size == 3 || size == 5) {
    for (int64_t j = 0; j < size; ++j) {
      for (int64_t i = 0; i < size; ++i) w[j * size + i] = back ? q[j * size + i] : q[i * size + j];
    }
  }
  for (int64_t outer = 0; outer < taps; outer += size * inner) {
    for (int64_t t = outer; t < outer + inner; ++t) {
      const T* x = from + t * kChunk;
      T* y = to + t * kChunk;
      if (size == 3) {
        mix_group<T, 3>(x, y, inner * kChunk, w, size);
      } else if (size == 5) {
        mix_group<T, 5>(x, y, inner * kChunk, w, size);
      } else {
        mix_any(x, y, inner * kChunk, q, size, back);
      }
    }
  }
}

// lanes[i, j] += x[i] x[j] for j <= i, each a vector of kSumLanes partial sums.
template <class T>
LIC_FAST_INLINE void gram_axis(const T* from, T* lanes, int64_t taps, int64_t size, int64_t inner) {
  for (int64_t outer = 0; outer < taps; outer += size * inner) {
    for (int64_t t = outer; t < outer + inner; ++t) {
      for (int64_t i = 0; i < size; ++i) {
        const T* __restrict__ x = from + (t + i * inner) * kChunk;
        for (int64_t j = 0; j <= i; ++j) {
          const T* __restrict__ y = from + (t + j * inner) * kChunk;
          T* __restrict__ sum = lanes + (i * size + j) * kSumLanes;
          for (int64_t l = 0; l < kSumLanes; ++l) {
            sum[l] += (x[l] * y[l] + x[l + 16] * y[l + 16]) + (x[l + 32] * y[l + 32] + x[l + 48] * y[l + 48]);
          }
        }
      }
    }
  }
}

template <class T>
LIC_FAST_INLINE void flush_lanes(T* lanes, double* sums, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0;
    for (int64_t l = 0; l < kSumLanes; ++l) sum += static_cast<double>(lanes[i * kSumLanes + l]);
    sums[i] += sum;
    std::fill_n(lanes + i * kSumLanes, kSumLanes, T(0));
  }
}

template <class T>
LIC_FAST_INLINE T* mix_chunk(const TapPass& pass, T* chunk, T* other) {
  const Planes& planes = *pass.planes;
  int64_t inner = planes.taps;
  for (size_t a = 0; a < planes.tap_axes(); ++a) {
    const Axis& axis = planes.axes[a];
    inner /= axis.size;
    if (!axis.basis) continue;
    mix_axis(chunk, other, planes.taps, axis.size, inner, static_cast<const T*>(axis.basis), pass.back);
    std::swap(chunk, other);
  }
  return chunk;
}

template <class T>
LIC_FAST_INLINE void gram_chunk(const TapPass& pass, const T* chunk) {
  const Planes& planes = *pass.planes;
  T* lanes = static_cast<T*>(pass.lanes);
  int64_t inner = planes.taps;
  for (size_t a = 0; a < planes.tap_axes(); ++a) {
    const Axis& axis = planes.axes[a];
    inner /= axis.size;
    if (!axis.factor) continue;
    gram_axis(chunk, lanes, planes.taps, axis.size, inner);
    lanes += axis.size * axis.size * kSumLanes;
  }
}

template <class T>
LIC_FAST_INLINE void tap_pass_of(const TapPass& pass) {
  const int64_t taps = pass.planes->taps, plane = pass.planes->plane();
  const T* from = static_cast<const T*>(pass.from);
  T* to = static_cast<T*>(pass.to);
  T* chunk = static_cast<T*>(pass.scratch);
  const int64_t sums = pass.sums ? gram_sums(*pass.planes) : 0;
  const int64_t flush = std::max<int64_t>(1, 128 / taps);  // sums of fp32 are kept short, the long ones are in fp64
  std::fill_n(static_cast<T*>(pass.lanes), pass.sums ? sums * kSumLanes : 0, T(0));
  for (int64_t first = 0, round = 1; first < plane; first += kChunk, ++round) {
    const int64_t n = std::min(kChunk, plane - first);
    for (int64_t t = 0; t < taps; ++t) {
      std::copy_n(from + t * plane + first, n, chunk + t * kChunk);
      if (n < kChunk) std::fill_n(chunk + t * kChunk + n, kChunk - n, T(0));
    }
    if (sums) gram_chunk(pass, chunk);
    if (sums && (round % flush == 0 || first + kChunk >= plane))
      flush_lanes(static_cast<T*>(pass.lanes), pass.sums, sums);
    if (!to) continue;
    const T* mixed = mix_chunk(pass, chunk, chunk + taps * kChunk);
    for (int64_t t = 0; t < taps; ++t) std::copy_n(mixed + t * kChunk, n, to + t * plane + first);
  }
}

template <class Isa>
LIC_FAST_INLINE void run_tap_pass_body(const TapPass& pass, bool f64) {
  if (f64) {
    tap_pass_of<double>(pass);
  } else {
    tap_pass_of<float>(pass);
  }
}

LIC_FAST_SIMD_VARIANTS(run_tap_pass, (const TapPass& pass, bool f64), (pass, f64));

// y = x Q for one row x [n], Q [n, n] row-major; back: y = x Q^T.
template <class T>
LIC_FAST_INLINE void row_times_basis_of(int64_t n, const T* __restrict__ x, const T* __restrict__ q, bool back,
                                        T* __restrict__ y) {
  if (back) {
    for (int64_t i = 0; i < n; ++i) {
      T lanes[kSumLanes] = {}, sum = 0;
      int64_t k = 0;
      for (; k + kSumLanes <= n; k += kSumLanes) {
        for (int64_t l = 0; l < kSumLanes; ++l) lanes[l] += x[k + l] * q[i * n + k + l];
      }
      for (; k < n; ++k) sum += x[k] * q[i * n + k];
      for (int64_t l = 0; l < kSumLanes; ++l) sum += lanes[l];
      y[i] = sum;
    }
    return;
  }
  std::fill_n(y, n, T(0));
  int64_t k = 0;
  for (; k + 4 <= n; k += 4) {
    const T* row = q + k * n;
    for (int64_t j = 0; j < n; ++j) {
      y[j] += (x[k] * row[j] + x[k + 1] * row[j + n]) + (x[k + 2] * row[j + 2 * n] + x[k + 3] * row[j + 3 * n]);
    }
  }
  for (; k < n; ++k) {
    for (int64_t j = 0; j < n; ++j) y[j] += x[k] * q[k * n + j];
  }
}

template <class Isa>
LIC_FAST_INLINE void run_row_times_basis_body(int64_t n, const void* x, const void* q, bool back, void* y, bool f64) {
  if (f64) {
    row_times_basis_of(n, static_cast<const double*>(x), static_cast<const double*>(q), back, static_cast<double*>(y));
  } else {
    row_times_basis_of(n, static_cast<const float*>(x), static_cast<const float*>(q), back, static_cast<float*>(y));
  }
}

LIC_FAST_SIMD_VARIANTS(run_row_times_basis, (int64_t n, const void* x, const void* q, bool back, void* y, bool f64),
                       (n, x, q, back, y, f64));

// The tap axes: to <- from mixed, where to is given; sums as in TapPass.
template <class T>
void tap_pass(const Planes& planes, const T* from, T* to, double* sums, bool back, Workspace& workspace) {
  T* scratch = workspace.get<T>(kScratchSlot, 2 * planes.taps * kChunk + gram_sums(planes) * kSumLanes);
  run_tap_pass({&planes, from, to, scratch, sums, scratch + 2 * planes.taps * kChunk, back}, sizeof(T) == 8);
}

inline bool mixes_taps(const Planes& planes) {
  return std::any_of(planes.axes.begin(), planes.axes.begin() + planes.tap_axes(),
                     [](const Axis& axis) { return axis.basis != nullptr; });
}

// The two buffers that the stages of a projection pass values between.
template <class T>
struct Pair {
  T* now;
  T* other;
  void swap() { std::swap(now, other); }
};

template <class T>
void project_rows(const Planes& planes, Pair<T>& data, bool back, Workspace& workspace) {
  if (!planes.row_axis() || !planes.row_axis()->basis) return;
  const T* q = static_cast<const T*>(planes.row_axis()->basis);
  const int64_t R = planes.rows, C = planes.columns;
  for (int64_t t = 0; t < planes.taps; ++t) {
    const int64_t at = t * planes.plane();
    gemm<T>(R, C, R, 1, q, back ? R : 1, back ? 1 : R, data.now + at, C, 1, 0, data.other + at, C, workspace);
  }
  data.swap();
}

template <class T, class Watcher>
void project_columns(const Planes& planes, Pair<T>& data, bool back, const Watcher& watcher, Workspace& workspace) {
  const T* q = static_cast<const T*>(planes.column_axis().basis);
  const int64_t M = planes.taps * planes.rows, C = planes.columns;
  if (!q) {
    data.swap();  // finished() works on other
    watcher.finished(0, M, 0, C);
  } else if (M == 1) {
    watcher.ahead(0, 1, 0, C);
    run_row_times_basis(C, data.now, q, back, data.other, sizeof(T) == 8);
    watcher.finished(0, 1, 0, C);
  } else {
    gemm_rows<T>(M, C, C, 1, data.now, C, 1, q, back ? 1 : C, back ? C : 1, 0, data.other, C, workspace, watcher);
  }
  data.swap();
}

}  // namespace
}  // namespace lic_fast
