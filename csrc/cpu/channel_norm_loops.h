// The loops of channel_norm.cpp over a stretch of places of one image, in either layout.
//
// Rows, the channels of a place side by side: a row is widened into a buffer in the first-level cache, and its sums go
// over the lanes of sums.h. Planes, the places of a channel side by side: a tile of kTile places of all channels is
// widened into a buffer, since planes as far apart as a power of two would drive each other out of the cache; sums over
// channels are made for all places of the tile at once, four channels at a time.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/sums.h"

namespace lic_fast {
namespace {

constexpr int64_t kTile = 128;
static_assert(kTile == padded_for_sums(kTile));

struct Norm {
  const void* x;
  const void* grad;    // null forward
  const void* weight;  // of the arithmetic's dtype, like all that follow
  const void* bias;
  const void* shift;       // [C] of this image, or null
  void* out;               // y, or d_x
  void* sums;              // backward: d_weight, d_bias and d_shift of this stretch, [3, C], to be written
  int64_t rows, channels;  // rows: places
  int64_t step;            // from a channel to the next, where they are planes; 0 where they lie side by side
  double eps;
  bool relu;
  int32_t dtype;
};

// value <- x less its mean; returns one over its standard deviation. value: as sum_of asks.
template <class T, class Acc>
LIC_FAST_INLINE Acc centre(const T* __restrict__ x, Acc* __restrict__ value, int64_t C, Acc eps) {
  for (int64_t c = 0; c < C; ++c) value[c] = convert<Acc>(x[c]);
  const Acc mean = sum_of<Acc>(C, value, nullptr) / static_cast<Acc>(C);
  for (int64_t c = 0; c < C; ++c) value[c] -= mean;
  return Acc(1) / std::sqrt(sum_of<Acc>(C, value, value) / static_cast<Acc>(C) + eps);
}

template <class T, class Acc>
LIC_FAST_INLINE void forward_rows(const Norm& p, Acc* __restrict__ value) {
  const int64_t C = p.channels;
  const Acc* __restrict__ weight = static_cast<const Acc*>(p.weight);
  const Acc* __restrict__ bias = static_cast<const Acc*>(p.bias);
  const Acc* __restrict__ shift = static_cast<const Acc*>(p.shift);
  const Acc least = p.relu ? Acc(0) : -std::numeric_limits<Acc>::infinity();
  for (int64_t r = 0; r < p.rows; ++r) {
    T* __restrict__ y = static_cast<T*>(p.out) + r * C;
    const Acc inverse = centre(static_cast<const T*>(p.x) + r * C, value, C, static_cast<Acc>(p.eps));
    if (shift) {
      for (int64_t c = 0; c < C; ++c) {
        const Acc before = value[c] * inverse * weight[c] + bias[c];
        y[c] = convert<T>((before < least ? least : before) + shift[c]);  // NaN stays
      }
    } else {
      for (int64_t c = 0; c < C; ++c) {
        const Acc before = value[c] * inverse * weight[c] + bias[c];
        y[c] = convert<T>(before < least ? least : before);
      }
    }
  }
}

template <class T, class Acc>
LIC_FAST_INLINE void backward_rows(const Norm& p, Acc* __restrict__ value) {
  const int64_t C = p.channels;
  Acc* __restrict__ scaled = value + padded_for_sums(C);
  const Acc* __restrict__ weight = static_cast<const Acc*>(p.weight);
  const Acc* __restrict__ bias = static_cast<const Acc*>(p.bias);
  Acc* __restrict__ d_weight = static_cast<Acc*>(p.sums);
  Acc* __restrict__ d_bias = d_weight + C;
  Acc* __restrict__ d_shift = d_bias + C;
  for (int64_t c = 0; c < 3 * C; ++c) d_weight[c] = Acc(0);
  for (int64_t r = 0; r < p.rows; ++r) {
    const T* __restrict__ grad = static_cast<const T*>(p.grad) + r * C;
    T* __restrict__ d_x = static_cast<T*>(p.out) + r * C;
    const Acc inverse = centre(static_cast<const T*>(p.x) + r * C, value, C, static_cast<Acc>(p.eps));
    for (int64_t c = 0; c < C; ++c) {
      value[c] *= inverse;
      const Acc g = convert<Acc>(grad[c]), before = value[c] * weight[c] + bias[c];
      const Acc kept = p.relu && !(before > Acc(0)) ? Acc(0) : g;
      d_shift[c] += g;
      d_bias[c] += kept;
      d_weight[c] += kept * value[c];
      scaled[c] = kept * weight[c];
    }
    const Acc count = static_cast<Acc>(C);
    const Acc mean = sum_of<Acc>(C, scaled, nullptr) / count;
    const Acc along = sum_of<Acc>(C, scaled, value) / count;
    for (int64_t c = 0; c < C; ++c) d_x[c] = convert<T>((scaled[c] - mean - value[c] * along) * inverse);
  }
}

// value [C, kTile] <- a tile's n places less their means; inverse <- one over their standard deviations. Where a row of
// value is summed later it is zero from n on.
template <class T, class Acc>
LIC_FAST_INLINE void centre_tile(const Norm& p, const T* __restrict__ x, int64_t n, Acc* __restrict__ value,
                                 Acc* __restrict__ inverse) {
  const int64_t C = p.channels, whole = C / 4 * 4;
  const Acc count = static_cast<Acc>(C), eps = static_cast<Acc>(p.eps);
  for (int64_t c = 0; c < C; ++c) {
    Acc* __restrict__ row = value + c * kTile;
    for (int64_t i = 0; i < n; ++i) row[i] = convert<Acc>(x[c * p.step + i]);
    for (int64_t i = n; i < padded_for_sums(n); ++i) row[i] = Acc(0);
  }
  Acc mean[kTile] = {}, square[kTile] = {};
  for (int64_t c = 0; c < whole; c += 4) {
    const Acc* __restrict__ row = value + c * kTile;
    for (int64_t i = 0; i < n; ++i) {
      mean[i] += (row[i] + row[kTile + i]) + (row[2 * kTile + i] + row[3 * kTile + i]);
    }
  }
  for (int64_t c = whole; c < C; ++c) {
    for (int64_t i = 0; i < n; ++i) mean[i] += value[c * kTile + i];
  }
  for (int64_t i = 0; i < n; ++i) mean[i] /= count;
  for (int64_t c = 0; c < whole; c += 4) {
    Acc* __restrict__ row = value + c * kTile;
    for (int64_t i = 0; i < n; ++i) {
      const Acc a = row[i] - mean[i], b = row[kTile + i] - mean[i];
      const Acc d = row[2 * kTile + i] - mean[i], e = row[3 * kTile + i] - mean[i];
      row[i] = a;
      row[kTile + i] = b;
      row[2 * kTile + i] = d;
      row[3 * kTile + i] = e;
      square[i] += (a * a + b * b) + (d * d + e * e);
    }
  }
  for (int64_t c = whole; c < C; ++c) {
    for (int64_t i = 0; i < n; ++i) {
      const Acc a = value[c * kTile + i] - mean[i];
      value[c * kTile + i] = a;
      square[i] += a * a;
    }
  }
  for (int64_t i = 0; i < n; ++i) inverse[i] = Acc(1) / std::sqrt(square[i] / count + eps);
}

template <class T, class Acc>
LIC_FAST_INLINE void forward_planes(const Norm& p, Acc* __restrict__ value) {
  const Acc* __restrict__ weight = static_cast<const Acc*>(p.weight);
  const Acc* __restrict__ bias = static_cast<const Acc*>(p.bias);
  const Acc* __restrict__ shift = static_cast<const Acc*>(p.shift);
  const Acc least = p.relu ? Acc(0) : -std::numeric_limits<Acc>::infinity();
  Acc inverse[kTile];
  for (int64_t first = 0; first < p.rows; first += kTile) {
    const int64_t n = p.rows - first < kTile ? p.rows - first : kTile;
    centre_tile(p, static_cast<const T*>(p.x) + first, n, value, inverse);
    for (int64_t c = 0; c < p.channels; ++c) {
      const Acc* __restrict__ row = value + c * kTile;
      T* __restrict__ y = static_cast<T*>(p.out) + c * p.step + first;
      const Acc w = weight[c], b = bias[c];
      if (shift) {
        const Acc s = shift[c];
        for (int64_t i = 0; i < n; ++i) {
          const Acc before = row[i] * inverse[i] * w + b;
          y[i] = convert<T>((before < least ? least : before) + s);  // NaN stays
        }
      } else {
        for (int64_t i = 0; i < n; ++i) {
          const Acc before = row[i] * inverse[i] * w + b;
          y[i] = convert<T>(before < least ? least : before);
        }
      }
    }
  }
}

template <class T, class Acc>
LIC_FAST_INLINE void backward_planes(const Norm& p, Acc* __restrict__ value) {
  const int64_t C = p.channels;
  Acc* __restrict__ scaled = value + C * kTile;
  const Acc* __restrict__ weight = static_cast<const Acc*>(p.weight);
  const Acc* __restrict__ bias = static_cast<const Acc*>(p.bias);
  Acc* __restrict__ sums = static_cast<Acc*>(p.sums);
  const Acc count = static_cast<Acc>(C);
  Acc inverse[kTile];
  for (int64_t c = 0; c < 3 * C; ++c) sums[c] = Acc(0);
  for (int64_t first = 0; first < p.rows; first += kTile) {
    const int64_t n = p.rows - first < kTile ? p.rows - first : kTile;
    centre_tile(p, static_cast<const T*>(p.x) + first, n, value, inverse);
    Acc mean[kTile] = {}, along[kTile] = {}, grad[kTile] = {}, kept[kTile] = {};
    for (int64_t c = 0; c < C; ++c) {
      const T* __restrict__ from = static_cast<const T*>(p.grad) + c * p.step + first;
      Acc* __restrict__ row = value + c * kTile;
      Acc* __restrict__ slope = scaled + c * kTile;
      const Acc w = weight[c], b = bias[c];
      for (int64_t i = 0; i < n; ++i) {
        row[i] *= inverse[i];
        grad[i] = convert<Acc>(from[i]);
        kept[i] = p.relu && !(row[i] * w + b > Acc(0)) ? Acc(0) : grad[i];
        slope[i] = kept[i] * w;
        mean[i] += slope[i];
        along[i] += slope[i] * row[i];
      }
      sums[c] += sum_of<Acc>(n, kept, row);
      sums[C + c] += sum_of<Acc>(n, kept, nullptr);
      sums[2 * C + c] += sum_of<Acc>(n, grad, nullptr);
    }
    for (int64_t i = 0; i < n; ++i) {
      mean[i] /= count;
      along[i] /= count;
    }
    for (int64_t c = 0; c < C; ++c) {
      const Acc* __restrict__ row = value + c * kTile;
      const Acc* __restrict__ slope = scaled + c * kTile;
      T* __restrict__ d_x = static_cast<T*>(p.out) + c * p.step + first;
      for (int64_t i = 0; i < n; ++i) d_x[i] = convert<T>((slope[i] - mean[i] - row[i] * along[i]) * inverse[i]);
    }
  }
}

// room: numbers that a stretch needs, of 8 bytes.
inline int64_t room_of(int64_t channels, bool planes) {
  return planes ? 2 * channels * kTile : 2 * padded_for_sums(channels);
}

template <class T, class Acc>
LIC_FAST_INLINE void run_stretch(const Norm& p, void* room) {
  Acc* value = static_cast<Acc*>(room);
  if (p.step) {
    p.grad ? backward_planes<T, Acc>(p, value) : forward_planes<T, Acc>(p, value);
  } else {
    p.grad ? backward_rows<T, Acc>(p, value) : forward_rows<T, Acc>(p, value);
  }
}

}  // namespace
}  // namespace lic_fast
