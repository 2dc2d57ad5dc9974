// From fp32 scales, means and weights to the integers of docs/BITSTREAM.md, section 7: the arithmetic of every device.
//
// Additions, products, quotients and roots of fp32 in the order of lic_fast/reference/_rans_mixture.py, each rounded by
// itself: the same integers everywhere. mixture_words is an element from beginning to end, as a thread of a GPU does
// it; the CPU (cpu/rans_mixture_parameters.h) runs its parts over tiles of elements. Free of torch.
#pragma once

#include <cmath>

#include "common/rans_mixture.h"

namespace lic_fast::rans {

struct MixtureInputs {  // of one sample: planes of components
  const float *scales, *means, *weights;
  int64_t stride;  // from one component to the next, in inputs and in the planes of words
  int32_t components;
  float steps;
  const float* reach;  // [17], in scales, by the bit length of a weight
  int32_t* words;
};

namespace parameters {

// nvcc fuses what it may; the C++ library is compiled so that nothing is fused.
#ifdef __CUDA_ARCH__
LIC_FAST_ANYWHERE float sum(float a, float b) { return __fadd_rn(a, b); }
LIC_FAST_ANYWHERE float product(float a, float b) { return __fmul_rn(a, b); }
LIC_FAST_ANYWHERE float quotient(float a, float b) { return __fdiv_rn(a, b); }
LIC_FAST_ANYWHERE float root(float a) { return __fsqrt_rn(a); }
#else
LIC_FAST_ANYWHERE float sum(float a, float b) { return a + b; }
LIC_FAST_ANYWHERE float product(float a, float b) { return a * b; }
LIC_FAST_ANYWHERE float quotient(float a, float b) { return a / b; }
LIC_FAST_ANYWHERE float root(float a) { return std::sqrt(a); }
#endif

LIC_FAST_ANYWHERE int32_t bits_of(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
LIC_FAST_ANYWHERE float of_bits(int32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
LIC_FAST_ANYWHERE float power(int32_t exponent) { return of_bits((exponent + 127) << 23); }

// Choices by bits: of `?:` of floats g++ makes branches, which it does not vectorise.
LIC_FAST_ANYWHERE float chosen(bool first, float a, float b) {
  const int32_t mask = -static_cast<int32_t>(first);
  return of_bits((bits_of(a) & mask) | (bits_of(b) & ~mask));
}
LIC_FAST_ANYWHERE float least_of(float a, float b) { return chosen(a < b, a, b); }
LIC_FAST_ANYWHERE float most_of(float a, float b) { return chosen(a > b, a, b); }
LIC_FAST_ANYWHERE float clamped(float value, float low, float high) {  // NaN becomes low
  return least_of(most_of(value, low), high);
}
LIC_FAST_ANYWHERE float floor_of(float value) {  // of magnitudes below 2^31, as all are here
  const float whole = static_cast<float>(static_cast<int32_t>(value));
  return sum(whole, chosen(whole > value, -1.0f, 0.0f));
}
LIC_FAST_ANYWHERE int32_t clamped(int32_t value, int32_t low, int32_t high) {
  value = value > low ? value : low;
  return value < high ? value : high;
}

constexpr float kLeastScale = 0.0078125f, kMostScale = 524288.0f;            // 2^-7, 2^19
constexpr float kMostMeans = 1073741824.0f, kFar = 1048576.0f;               // 2^30, 2^20
constexpr float kLeastWeight = 7.8886091e-31f, kMostWeight = 1.2676506e30f;  // 2^-100, 2^100

LIC_FAST_ANYWHERE float weight_of(float weight) {
  return chosen(weight >= kLeastWeight, least_of(weight, kMostWeight), 0.0f);
}
LIC_FAST_ANYWHERE float scale_of(float scale) { return clamped(scale, kLeastScale, kMostScale); }
LIC_FAST_ANYWHERE float mean_of(float mean) { return clamped(mean, -kMostMeans, kMostMeans); }
LIC_FAST_ANYWHERE float mean_from(float mean, float base) { return clamped(sum(mean_of(mean), -base), -kFar, kFar); }

// A weight as a part of kWeights, before what rounding leaves goes to the heaviest, the first of these.
LIC_FAST_ANYWHERE int32_t integer_weight(float weight, float total) {
  const float share = quotient(weight_of(weight), most_of(total, kLeastWeight));
  return static_cast<int32_t>(sum(product(share, 32768.0f), 0.5f));
}

// The nearest integer to the heaviest component's mean: the others are told from there.
LIC_FAST_ANYWHERE float base_of(float mean) { return floor_of(sum(mean_of(mean), 0.5f)); }

// Where an element's components lie: as far as they reach, moments times kWeights, the smallest scale.
struct Extent {
  float low = 1e30f, high = -1e30f, mean = 0.0f, square = 0.0f, smallest = 1e30f;
};

LIC_FAST_ANYWHERE void extend(Extent& to, float scale, float mean, float base, int32_t weight, const float* reaches) {
  const float share = static_cast<float>(weight);
  const int32_t length = clamped((bits_of(share) >> 23) - 126, 0, 16);
  scale = scale_of(scale);
  mean = mean_from(mean, base);
  const float reach = product(scale, reaches[length]);
  to.low = chosen(weight != 0, least_of(sum(mean, -reach), to.low), to.low);
  to.high = chosen(weight != 0, most_of(sum(mean, reach), to.high), to.high);
  to.smallest = chosen(weight != 0, least_of(scale, to.smallest), to.smallest);
  to.mean = sum(to.mean, product(share, mean));
  to.square = sum(to.square, product(share, sum(product(scale, scale), product(mean, mean))));
}

// What an element's first two words are, and its components' words need.
struct Frame {
  int32_t first;
  uint32_t range;
  int32_t shift;
  float lowest, smallest;
};

LIC_FAST_ANYWHERE Frame frame_of(const Extent& of, float base) {
  const int32_t shift = clamped((bits_of(of.smallest) >> 23) - 131, 0, kMostShift);
  const float inverse = power(-shift), mean = product(of.mean, 1.0f / 32768.0f);
  const float low = floor_of(sum(of.low, 0.5f)), high = floor_of(sum(of.high, 0.5f));
  const int32_t wanted = (static_cast<int32_t>(sum(high, -low)) >> shift) + 1;
  const float middle = sum(floor_of(sum(mean, 0.5f)), -product(power(shift), 511.0f));
  const float lowest = chosen(wanted > kMostRange, middle, low);
  const int32_t size = wanted > kMostRange ? kMostRange : wanted;
  const float variance = sum(product(of.square, 1.0f / 32768.0f), -product(mean, mean));
  const float spread = product(root(most_of(variance, 0.00006103515625f)), inverse);
  const int32_t code = clamped((bits_of(spread) >> 19) - 1936, 0, 255);
  const float at = quotient(product(sum(sum(mean, -lowest), 0.5f), inverse), static_cast<float>(size));
  const int32_t centre = static_cast<int32_t>(clamped(product(at, 256.0f), 0.0f, 255.0f));
  return {static_cast<int32_t>(base) + static_cast<int32_t>(lowest) - (1 << shift),
          static_cast<uint32_t>(centre) << 24 | static_cast<uint32_t>(code << 16 | shift << 12 | size), shift, lowest,
          of.smallest};
}

// A component's mean, as seen from the first slot's value, and its form.
LIC_FAST_ANYWHERE int32_t mean_word(const Frame& frame, float mean, float base) {
  const float step = power(frame.shift), inverse = power(kUnitBits - frame.shift);
  const float at = product(sum(sum(mean_from(mean, base), -frame.lowest), sum(step, 0.5f)), inverse);
  return static_cast<int32_t>(floor_of(sum(clamped(at, -2097152.0f, 2097152.0f), 0.5f)));
}
LIC_FAST_ANYWHERE int32_t form_word(const Frame& frame, float scale, int32_t weight, float steps) {
  const float widest = product(product(steps, 0.25f), power(frame.shift));
  const int32_t rounded = (bits_of(quotient(widest, most_of(scale_of(scale), frame.smallest))) + 0x4000) >> 15;
  return static_cast<int32_t>(static_cast<uint32_t>(weight) << 16) | (135 - (rounded >> 8)) << 8 | (rounded & 255);
}

}  // namespace parameters

// All words of element i.
LIC_FAST_ANYWHERE void mixture_words(const MixtureInputs& in, int64_t i) {
  const auto input = [&](const float* planes, int32_t k) { return planes[k * in.stride + i]; };
  float total = 0.0f;
  for (int32_t k = 0; k < in.components; ++k) {
    total = parameters::sum(total, parameters::weight_of(input(in.weights, k)));
  }
  int32_t rest = static_cast<int32_t>(kWeights), most = -1, heaviest = 0;
  for (int32_t k = 0; k < in.components; ++k) {
    const int32_t weight = parameters::integer_weight(input(in.weights, k), total);
    rest -= weight;
    if (weight > most) most = weight, heaviest = k;
  }
  const auto weight = [&](int32_t k) {
    return parameters::integer_weight(input(in.weights, k), total) + (k == heaviest ? rest : 0);
  };
  const float base = parameters::base_of(input(in.means, heaviest));
  parameters::Extent extent;
  for (int32_t k = 0; k < in.components; ++k) {
    parameters::extend(extent, input(in.scales, k), input(in.means, k), base, weight(k), in.reach);
  }
  const parameters::Frame frame = parameters::frame_of(extent, base);
  in.words[i] = frame.first;
  in.words[in.stride + i] = static_cast<int32_t>(frame.range);
  for (int32_t k = 0; k < in.components; ++k) {
    int32_t* const out = in.words + (2 + 2 * k) * in.stride + i;
    out[0] = parameters::mean_word(frame, input(in.means, k), base);
    out[in.stride] = parameters::form_word(frame, input(in.scales, k), weight(k), in.steps);
  }
}

}  // namespace lic_fast::rans
