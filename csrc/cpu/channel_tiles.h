// A tile of gdn.cpp in and out of memory: columns [first, first + n) of all channels, as [C, step].
#pragma once

#include <type_traits>

#include "cpu/gdn_loops.h"
#include "cpu/gemm.h"

namespace lic_fast {

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

struct Layout {
  int64_t batch, channels, positions;  // positions: of one image
  bool last;                           // the channels are

  int64_t columns() const { return batch * positions; }
};

inline Workspace& scratch() {
  static thread_local Workspace workspace;
  return workspace;
}

// Calls body(element, at, length) for each stretch of columns in one image: its first element in channel 0, its place
// in the tile.
template <class Body>
void each_stretch(const Layout& layout, int64_t first, int64_t n, const Body& body) {
  for (int64_t at = 0; at < n;) {
    const int64_t image = (first + at) / layout.positions, s = (first + at) % layout.positions;
    const int64_t length = std::min(n - at, layout.positions - s);
    body(image * layout.channels * layout.positions + s, at, length);
    at += length;
  }
}

template <class T, class Acc>
void gather(const Layout& layout, const T* from, int64_t first, int64_t n, Acc* tile, int64_t step) {
  const int64_t C = layout.channels;
  if (!layout.last) {
    each_stretch(layout, first, n, [&](int64_t element, int64_t at, int64_t length) {
      for (int64_t c = 0; c < C; ++c) convert_row(from + element + c * layout.positions, length, tile + c * step + at);
    });
  } else if constexpr (std::is_same_v<T, Acc>) {
    gemm_kernels<Acc>().transpose(from + first * C, C, n, C, tile, step);
  } else {
    Acc* rows = scratch().get<Acc>(kRows, C * step);
    convert_row(from + first * C, n * C, rows);
    gemm_kernels<Acc>().transpose(rows, C, n, C, tile, step);
  }
}

template <class T, class Acc>
void scatter(const Layout& layout, const Acc* tile, int64_t step, int64_t first, int64_t n, T* to) {
  const int64_t C = layout.channels;
  if (!layout.last) {
    each_stretch(layout, first, n, [&](int64_t element, int64_t at, int64_t length) {
      for (int64_t c = 0; c < C; ++c) convert_row(tile + c * step + at, length, to + element + c * layout.positions);
    });
  } else if constexpr (std::is_same_v<T, Acc>) {
    gemm_kernels<Acc>().transpose(tile, step, C, n, to + first * C, C);
  } else {
    Acc* rows = scratch().get<Acc>(kRows, C * step);
    gemm_kernels<Acc>().transpose(tile, step, C, n, rows, C);
    convert_row(rows, n * C, to + first * C);
  }
}

// Asks for channels [i, i + m) of columns [first, first + n) while there is something to compute: their stretches lie
// far apart, where the processor does not see the next one coming. Where the channels are last, it does.
template <bool kWrite, class T>
void ahead(const Layout& layout, const T* base, int64_t first, int64_t n, int64_t i, int64_t m) {
  if (!base || layout.last || first >= layout.columns()) return;
  const int64_t S = layout.positions, image = first / S, s = first % S, length = std::min(n, S - s);
  for (int64_t c = i; c < i + m; ++c) {
    const char* from = reinterpret_cast<const char*>(base + (image * layout.channels + c) * S + s);
    const char* end = from + length * static_cast<int64_t>(sizeof(T));
    for (; from < end; from += 64) __builtin_prefetch(from, kWrite, 2);
  }
}

}  // namespace lic_fast
