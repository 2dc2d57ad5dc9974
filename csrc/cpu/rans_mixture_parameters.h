// From fp32 scales, means and weights to the integers of docs/BITSTREAM.md, section 7, a tile of elements at a time.
//
// Additions, products, quotients and roots of fp32 in the order of lic_fast/reference/_rans_mixture.py, none fused: the
// same integers everywhere.
#pragma once

#include <cmath>

#include "common/rans_mixture.h"
#include "cpu/simd.h"

namespace lic_fast::rans {

struct MixtureInputs {  // of one sample: planes of components
  const float *scales, *means, *weights;
  int64_t stride;  // from one component to the next, in inputs and in the planes of words
  int32_t components;
  float steps;
  float reach[17];
  int32_t* words;
};

namespace detail {

constexpr int64_t kTile = 256;

LIC_FAST_INLINE int32_t bits_of(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
LIC_FAST_INLINE float of_bits(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
LIC_FAST_INLINE float power(int32_t exponent) { return of_bits((exponent + 127) << 23); }

// Choices by bits: of `?:` of floats g++ makes branches, which it does not vectorise.
LIC_FAST_INLINE float chosen(bool first, float a, float b) {
  const int32_t mask = -static_cast<int32_t>(first);
  return of_bits((bits_of(a) & mask) | (bits_of(b) & ~mask));
}
LIC_FAST_INLINE float least_of(float a, float b) { return chosen(a < b, a, b); }
LIC_FAST_INLINE float most_of(float a, float b) { return chosen(a > b, a, b); }
LIC_FAST_INLINE float clamped(float value, float low, float high) {  // NaN becomes low
  return least_of(most_of(value, low), high);
}
LIC_FAST_INLINE float floor_of(float value) {  // of magnitudes below 2^31, as all are here
  const float whole = static_cast<float>(static_cast<int32_t>(value));
  return whole - chosen(whole > value, 1.0f, 0.0f);
}
LIC_FAST_INLINE int32_t clamped(int32_t value, int32_t low, int32_t high) {
  value = value > low ? value : low;
  return value < high ? value : high;
}

constexpr float kLeastScale = 0.0078125f, kMostScale = 524288.0f;            // 2^-7, 2^19
constexpr float kMostMeans = 1073741824.0f, kFar = 1048576.0f;               // 2^30, 2^20
constexpr float kLeastWeight = 7.8886091e-31f, kMostWeight = 1.2676506e30f;  // 2^-100, 2^100

LIC_FAST_INLINE float weight_of(float weight) { return chosen(weight >= kLeastWeight, least_of(weight, kMostWeight), 0.0f); }

struct Tile {
  int32_t weight[kMostComponents][kTile];
  float base[kTile], low[kTile], high[kTile], mean[kTile], square[kTile], smallest[kTile];
  float scratch[kTile];
  int32_t sum[kTile], most[kTile], heaviest[kTile], shift[kTile];
  float lowest[kTile];
};

// Integer weights that sum to kWeights; what rounding leaves goes to the heaviest, the first of these.
LIC_FAST_INLINE void weigh(const MixtureInputs& in, int64_t first, int64_t n, Tile& t) {
  for (int64_t i = 0; i < n; ++i) t.scratch[i] = 0.0f, t.sum[i] = 0, t.most[i] = -1, t.heaviest[i] = 0;
  for (int32_t k = 0; k < in.components; ++k) {
    const float* weights = in.weights + k * in.stride + first;
    for (int64_t i = 0; i < n; ++i) t.scratch[i] = t.scratch[i] + weight_of(weights[i]);
  }
  for (int32_t k = 0; k < in.components; ++k) {
    const float* weights = in.weights + k * in.stride + first;
    for (int64_t i = 0; i < n; ++i) {
      const float share = weight_of(weights[i]) / most_of(t.scratch[i], kLeastWeight);
      const int32_t weight = static_cast<int32_t>(share * 32768.0f + 0.5f);
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

// Where the mixtures lie, about the nearest integer to their heaviest component's mean.
LIC_FAST_INLINE void place(const MixtureInputs& in, int64_t first, int64_t n, Tile& t) {
  for (int64_t i = 0; i < n; ++i) {
    t.low[i] = 1e30f, t.high[i] = -1e30f, t.smallest[i] = 1e30f, t.mean[i] = 0.0f, t.square[i] = 0.0f;
    t.base[i] = 0.0f;
  }
  for (int32_t k = 0; k < in.components; ++k) {
    const float* means = in.means + k * in.stride + first;
    for (int64_t i = 0; i < n; ++i) {
      const float mean = floor_of(clamped(means[i], -kMostMeans, kMostMeans) + 0.5f);
      t.base[i] = chosen(t.heaviest[i] == k, mean, t.base[i]);
    }
  }
  for (int32_t k = 0; k < in.components; ++k) {
    const float *means = in.means + k * in.stride + first, *scales = in.scales + k * in.stride + first;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t weight = t.weight[k][i];
      const float share = static_cast<float>(weight);
      const int32_t length = clamped((bits_of(share) >> 23) - 126, 0, 16);
      const float scale = clamped(scales[i], kLeastScale, kMostScale);
      const float mean = clamped(clamped(means[i], -kMostMeans, kMostMeans) - t.base[i], -kFar, kFar);
      const float reach = scale * in.reach[length];
      t.low[i] = chosen(weight != 0, least_of(mean - reach, t.low[i]), t.low[i]);
      t.high[i] = chosen(weight != 0, most_of(mean + reach, t.high[i]), t.high[i]);
      t.smallest[i] = chosen(weight != 0, least_of(scale, t.smallest[i]), t.smallest[i]);
      t.mean[i] = t.mean[i] + share * mean;
      t.square[i] = t.square[i] + share * (scale * scale + mean * mean);
    }
  }
}

// First and range of each element.
LIC_FAST_INLINE void frame(const MixtureInputs& in, int64_t first, int64_t n, Tile& t) {
  int32_t *out = in.words + first, *range = out + in.stride;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t shift = clamped((bits_of(t.smallest[i]) >> 23) - 131, 0, kMostShift);
    const float inverse = power(-shift), mean = t.mean[i] * (1.0f / 32768.0f);
    const float low = floor_of(t.low[i] + 0.5f), high = floor_of(t.high[i] + 0.5f);
    const int32_t wanted = (static_cast<int32_t>(high - low) >> shift) + 1;
    const float middle = floor_of(mean + 0.5f) - power(shift) * 511.0f;
    const float lowest = chosen(wanted > kMostRange, middle, low);
    const int32_t size = wanted > kMostRange ? kMostRange : wanted;
    const float variance = t.square[i] * (1.0f / 32768.0f) - mean * mean;
    const float spread = std::sqrt(most_of(variance, 0.00006103515625f)) * inverse;
    const int32_t code = clamped((bits_of(spread) >> 19) - 1936, 0, 255);
    const float at = ((mean - lowest) + 0.5f) * inverse / static_cast<float>(size);
    const int32_t centre = static_cast<int32_t>(clamped(at * 256.0f, 0.0f, 255.0f));
    t.shift[i] = shift;
    t.lowest[i] = lowest;
    out[i] = static_cast<int32_t>(t.base[i]) + static_cast<int32_t>(lowest) - (1 << shift);
    range[i] = static_cast<int32_t>(static_cast<uint32_t>(centre) << 24) | code << 16 | shift << 12 | size;
  }
}

// Mean and form of each component, as seen from the first slot's value.
LIC_FAST_INLINE void form(const MixtureInputs& in, int64_t first, int64_t n, const Tile& t) {
  for (int32_t k = 0; k < in.components; ++k) {
    const float *means = in.means + k * in.stride + first, *scales = in.scales + k * in.stride + first;
    int32_t *out = in.words + (2 + 2 * k) * in.stride + first, *forms = out + in.stride;
    for (int64_t i = 0; i < n; ++i) {
      const float step = power(t.shift[i]), inverse = power(kUnitBits - t.shift[i]);
      const float scale = clamped(scales[i], kLeastScale, kMostScale);
      const float mean = clamped(clamped(means[i], -kMostMeans, kMostMeans) - t.base[i], -kFar, kFar);
      const float at = ((mean - t.lowest[i]) + (step + 0.5f)) * inverse;
      out[i] = static_cast<int32_t>(floor_of(clamped(at, -2097152.0f, 2097152.0f) + 0.5f));
      const int32_t rounded = (bits_of(in.steps * 0.25f * step / most_of(scale, t.smallest[i])) + 0x4000) >> 15;
      const uint32_t weight = static_cast<uint32_t>(t.weight[k][i]);
      forms[i] = static_cast<int32_t>(weight << 16) | (135 - (rounded >> 8)) << 8 | (rounded & 255);
    }
  }
}

}  // namespace detail

template <class Isa>
LIC_FAST_INLINE void mixture_words_body(const MixtureInputs* in, int64_t begin, int64_t end) {
  detail::Tile tile;
  for (; begin < end; begin += detail::kTile) {
    const int64_t n = end - begin < detail::kTile ? end - begin : detail::kTile;
    detail::weigh(*in, begin, n, tile);
    detail::place(*in, begin, n, tile);
    detail::frame(*in, begin, n, tile);
    detail::form(*in, begin, n, tile);
  }
}
LIC_FAST_SIMD_VARIANTS(mixture_words, (const MixtureInputs* in, int64_t begin, int64_t end), (in, begin, end));

}  // namespace lic_fast::rans
