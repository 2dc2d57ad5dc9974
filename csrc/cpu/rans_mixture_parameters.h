// The arithmetic of common/rans_mixture_parameters.h over a tile of elements at a time, component after component.
#pragma once

#include "common/rans_mixture_parameters.h"
#include "cpu/simd.h"

namespace lic_fast::rans {
namespace parameters {

constexpr int64_t kTile = 256;

struct Tile {
  int32_t weight[kMostComponents][kTile];
  float base[kTile], low[kTile], high[kTile], mean[kTile], square[kTile], smallest[kTile], lowest[kTile], total[kTile];
  int32_t sum[kTile], most[kTile], heaviest[kTile], shift[kTile];
};

// Integer weights that sum to kWeights.
LIC_FAST_INLINE void weigh(const MixtureInputs& in, int64_t first, int64_t n, Tile& t) {
  for (int64_t i = 0; i < n; ++i) t.total[i] = 0.0f, t.sum[i] = 0, t.most[i] = -1, t.heaviest[i] = 0;
  for (int32_t k = 0; k < in.components; ++k) {
    const float* weights = in.weights + k * in.stride + first;
    for (int64_t i = 0; i < n; ++i) t.total[i] = sum(t.total[i], weight_of(weights[i]));
  }
  for (int32_t k = 0; k < in.components; ++k) {
    const float* weights = in.weights + k * in.stride + first;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t weight = integer_weight(weights[i], t.total[i]);
      t.weight[k][i] = weight;
      t.sum[i] += weight;
      t.heaviest[i] = weight > t.most[i] ? k : t.heaviest[i];
      t.most[i] = weight > t.most[i] ? weight : t.most[i];
    }
  }
  for (int32_t k = 0; k < in.components; ++k) {
    for (int64_t i = 0; i < n; ++i) {
      t.weight[k][i] += t.heaviest[i] == k ? static_cast<int32_t>(kWeights) - t.sum[i] : 0;
    }
  }
}

LIC_FAST_INLINE void place(const MixtureInputs& in, int64_t first, int64_t n, Tile& t) {
  const Extent none;
  for (int64_t i = 0; i < n; ++i) {
    t.low[i] = none.low, t.high[i] = none.high, t.mean[i] = none.mean, t.square[i] = none.square;
    t.smallest[i] = none.smallest, t.base[i] = 0.0f;
  }
  for (int32_t k = 0; k < in.components; ++k) {
    const float* means = in.means + k * in.stride + first;
    for (int64_t i = 0; i < n; ++i) {
      const float base = base_of(means[i]);
      t.base[i] = chosen(t.heaviest[i] == k, base, t.base[i]);
    }
  }
  for (int32_t k = 0; k < in.components; ++k) {
    const float *means = in.means + k * in.stride + first, *scales = in.scales + k * in.stride + first;
    for (int64_t i = 0; i < n; ++i) {
      Extent extent{t.low[i], t.high[i], t.mean[i], t.square[i], t.smallest[i]};
      extend(extent, scales[i], means[i], t.base[i], t.weight[k][i], in.reach);
      t.low[i] = extent.low, t.high[i] = extent.high, t.mean[i] = extent.mean, t.square[i] = extent.square;
      t.smallest[i] = extent.smallest;
    }
  }
}

LIC_FAST_INLINE void frame(const MixtureInputs& in, int64_t first, int64_t n, Tile& t) {
  int32_t *out = in.words + first, *range = out + in.stride;
  for (int64_t i = 0; i < n; ++i) {
    const Frame found = frame_of({t.low[i], t.high[i], t.mean[i], t.square[i], t.smallest[i]}, t.base[i]);
    t.shift[i] = found.shift;
    t.lowest[i] = found.lowest;
    out[i] = found.first;
    range[i] = static_cast<int32_t>(found.range);
  }
}

LIC_FAST_INLINE void form(const MixtureInputs& in, int64_t first, int64_t n, const Tile& t) {
  for (int32_t k = 0; k < in.components; ++k) {
    const float *means = in.means + k * in.stride + first, *scales = in.scales + k * in.stride + first;
    int32_t *out = in.words + (2 + 2 * k) * in.stride + first, *forms = out + in.stride;
    for (int64_t i = 0; i < n; ++i) {
      const Frame of{0, 0, t.shift[i], t.lowest[i], t.smallest[i]};
      out[i] = mean_word(of, means[i], t.base[i]);
      forms[i] = form_word(of, scales[i], t.weight[k][i], in.steps);
    }
  }
}

}  // namespace parameters

template <class Isa>
LIC_FAST_INLINE void mixture_tiles_body(const MixtureInputs* in, int64_t begin, int64_t end) {
  parameters::Tile tile;
  for (; begin < end; begin += parameters::kTile) {
    const int64_t n = end - begin < parameters::kTile ? end - begin : parameters::kTile;
    parameters::weigh(*in, begin, n, tile);
    parameters::place(*in, begin, n, tile);
    parameters::frame(*in, begin, n, tile);
    parameters::form(*in, begin, n, tile);
  }
}
LIC_FAST_SIMD_VARIANTS(mixture_tiles, (const MixtureInputs* in, int64_t begin, int64_t end), (in, begin, end));

}  // namespace lic_fast::rans
