// Tiles of all channels by some places, [C, step] as kernels that mix channels work on them: in and out of memory, and
// products with a matrix of the channels.
#pragma once

#include <type_traits>

#include "cpu/gemm.h"
#include "cpu/simd.h"

namespace lic_fast {

constexpr int64_t kTileBytes = 96 << 10;  // of one tile [C, step]; backward holds four, gamma and its gradient in L2
constexpr int64_t kMostPanels = 6;

enum Slot : int {
  kX = Workspace::kFirstFree,
  kGrad,
  kFactor,
  kNorm,
  kRows,
  kPanelSum,
  kPacked,
  kPackedBack,
  kGamma,
  kBeta
};

template <class Isa>
LIC_FAST_INLINE void widen_body(const BFloat16* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = convert<float>(from[i]);
}

template <class Isa>
LIC_FAST_INLINE void narrow_body(const float* from, int64_t n, BFloat16* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = convert<BFloat16>(from[i]);
}

LIC_FAST_SIMD_VARIANTS(widen, (const BFloat16* from, int64_t n, float* to), (from, n, to));
LIC_FAST_SIMD_VARIANTS(narrow, (const float* from, int64_t n, BFloat16* to), (from, n, to));

// Rows of any dtype to and from the dtype of the arithmetic.
inline void convert_row(const float* from, int64_t n, float* to) { std::memcpy(to, from, n * sizeof(float)); }
inline void convert_row(const double* from, int64_t n, double* to) { std::memcpy(to, from, n * sizeof(double)); }
inline void convert_row(const BFloat16* from, int64_t n, float* to) { widen(from, n, to); }
inline void convert_row(const float* from, int64_t n, BFloat16* to) { narrow(from, n, to); }

// Where element (image, channel, position) lies: places are neighbours in memory, or, where `last`, channels are.
struct Layout {
  int64_t batch, channels, positions;  // positions: of one image
  bool last;                           // the channels are
  int64_t image, step;                 // elements between images; between channels, or places where `last`

  int64_t columns() const { return batch * positions; }
};

inline Workspace& scratch() {
  static thread_local Workspace workspace;
  return workspace;
}

inline Layout dense(int64_t batch, int64_t channels, int64_t positions, bool last) {
  return {batch, channels, positions, last, channels * positions, last ? channels : positions};
}

// The columns of a tile: whole panels.
template <class T>
int64_t tile_step(int64_t channels) {
  const int64_t panel = 3 * gemm_kernels<T>().lanes;
  return panel * std::clamp<int64_t>(kTileBytes / (channels * panel * static_cast<int64_t>(sizeof(T))), 1, kMostPanels);
}

// Calls body(element, at, length) for each stretch of columns in one image: its first element in channel 0, its place
// in the tile.
template <class Body>
void each_stretch(const Layout& layout, int64_t first, int64_t n, const Body& body) {
  for (int64_t at = 0; at < n;) {
    const int64_t image = (first + at) / layout.positions, s = (first + at) % layout.positions;
    const int64_t length = std::min(n - at, layout.positions - s);
    body(image * layout.image + s * (layout.last ? layout.step : 1), at, length);
    at += length;
  }
}

// n rows of C numbers, `step` apart, into rows that are to_step apart.
template <class From, class To>
void to_rows(const From* from, int64_t step, int64_t n, int64_t C, To* to, int64_t to_step) {
  if (step == C && to_step == C) return convert_row(from, n * C, to);
  for (int64_t r = 0; r < n; ++r) convert_row(from + r * step, C, to + r * to_step);
}

// Columns [first, first + n) of all images' places.
template <class T, class Acc>
void gather(const Layout& layout, const T* from, int64_t first, int64_t n, Acc* tile, int64_t step) {
  const int64_t C = layout.channels;
  each_stretch(layout, first, n, [&](int64_t element, int64_t at, int64_t length) {
    if (!layout.last) {
      for (int64_t c = 0; c < C; ++c) convert_row(from + element + c * layout.step, length, tile + c * step + at);
    } else if constexpr (std::is_same_v<T, Acc>) {
      gemm_kernels<Acc>().transpose(from + element, layout.step, length, C, tile + at, step);
    } else {
      Acc* rows = scratch().get<Acc>(kRows, C * length);
      to_rows(from + element, layout.step, length, C, rows, C);
      gemm_kernels<Acc>().transpose(rows, C, length, C, tile + at, step);
    }
  });
}

template <class T, class Acc>
void scatter(const Layout& layout, const Acc* tile, int64_t step, int64_t first, int64_t n, T* to) {
  const int64_t C = layout.channels;
  each_stretch(layout, first, n, [&](int64_t element, int64_t at, int64_t length) {
    if (!layout.last) {
      for (int64_t c = 0; c < C; ++c) convert_row(tile + c * step + at, length, to + element + c * layout.step);
    } else if constexpr (std::is_same_v<T, Acc>) {
      gemm_kernels<Acc>().transpose(tile + at, step, C, length, to + element, layout.step);
    } else {
      Acc* rows = scratch().get<Acc>(kRows, C * length);
      gemm_kernels<Acc>().transpose(tile + at, step, C, length, rows, C);
      to_rows(rows, C, length, C, to + element, layout.step);
    }
  });
}

// Asks for channels [i, i + m) of columns [first, first + n) while there is something to compute: their stretches lie
// far apart, where the processor does not see the next one coming. Where the channels are last, it does.
template <bool kWrite, class T>
void ahead(const Layout& layout, const T* base, int64_t first, int64_t n, int64_t i, int64_t m) {
  if (!base || layout.last || first >= layout.columns()) return;
  const int64_t image = first / layout.positions, s = first % layout.positions;
  const int64_t length = std::min(n, layout.positions - s);
  for (int64_t c = i; c < i + m; ++c) {
    const char* from = reinterpret_cast<const char*>(base + image * layout.image + c * layout.step + s);
    const char* end = from + length * static_cast<int64_t>(sizeof(T));
    for (; from < end; from += 64) __builtin_prefetch(from, kWrite, 2);
  }
}

// finish(i, m, j, n, sum, step) for every m rows and n columns of packed [rows, depth] times right [depth, step].
template <class Acc, class Finish>
void multiply(int64_t rows, int64_t depth, const Acc* packed, const Acc* right, int64_t step, int64_t columns,
              const Finish& finish) {
  const GemmKernels<Acc>& use = gemm_kernels<Acc>();
  const int64_t panel = 3 * use.lanes;
  Acc* sum = scratch().get<Acc>(kPanelSum, use.rows * panel);
  for (int64_t j = 0; j < columns; j += panel) {
    const int64_t n = std::min(panel, columns - j), vectors = gemm_detail::divide_up(n, use.lanes);
    for (int64_t i = 0; i < rows; i += use.rows) {
      const int64_t m = std::min(use.rows, rows - i);
      use.tile[vectors - 1](depth, packed + i * depth, use.rows, right + j, step, Acc(1), Acc(0), sum, panel, m,
                            vectors * use.lanes);
      finish(i, m, j, n, sum, panel);
    }
  }
}

}  // namespace lic_fast
