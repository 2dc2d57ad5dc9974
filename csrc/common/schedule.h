// A step of a latent's schedule: which elements it has, and what becomes of each; the same on the host and on devices.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/choose.h"
#include "common/tensors.h"

namespace lic_fast {

constexpr float kMostSymbol = 1073741824.0f;  // 2^30

// The elements [batch, channels, h, w] of a step in a latent [batch, all channels, height, width], both contiguous.
struct Step {
  int64_t batch, channels, h, w;
  int64_t all, height, width;
  int64_t first, row, column, stride;

  LIC_FAST_ANYWHERE int64_t rows() const { return batch * channels * h; }

  // where row r of the step's rows begins: in the latent, in scales, and in means beside it
  LIC_FAST_ANYWHERE int64_t in_latent(int64_t r) const {
    const int64_t plane = r / h, sample = plane / channels, channel = first + plane % channels;
    return ((sample * all + channel) * height + row + r % h * stride) * width + column;
  }
  LIC_FAST_ANYWHERE int64_t in_scales(int64_t r) const { return (r + r / (channels * h) * channels * h) * w; }
  LIC_FAST_ANYWHERE int64_t to_means() const { return channels * h * w; }
};

// Whether `part` [B, c, h, w] and `parameters` [B, 2 c, h, w] are the step's of `latent`, whose numbers go to `step`.
inline bool is_step(const Tensor& latent, const Tensor& part, const Tensor& parameters, Step* step) {
  if (latent.dim() != 4 || part.dim() != 4 || parameters.dim() != 4) return false;
  if (!latent.is_contiguous() || !part.is_contiguous() || !parameters.is_contiguous()) return false;
  step->batch = part.size(0), step->channels = part.size(1), step->h = part.size(2), step->w = part.size(3);
  step->all = latent.size(1), step->height = latent.size(2), step->width = latent.size(3);
  const int64_t rows = step->stride > 0 ? (step->height - step->row + step->stride - 1) / step->stride : -1;
  const int64_t columns = step->stride > 0 ? (step->width - step->column + step->stride - 1) / step->stride : -1;
  return step->first >= 0 && step->row >= 0 && step->column >= 0 && rows == step->h && columns == step->w &&
         step->first + step->channels <= step->all && latent.size(0) == step->batch &&
         parameters.size(0) == step->batch && parameters.size(1) == 2 * step->channels &&
         parameters.size(2) == step->h && parameters.size(3) == step->w;
}

// The level of a scale by its bits (docs/BITSTREAM.md, section 2).
LIC_FAST_ANYWHERE uint8_t level_of_scale(float scale) {
  int32_t bits;
  std::memcpy(&bits, &scale, sizeof bits);
  const int32_t key = (bits >> 19) - 1980, least = key > 0 ? key : 0;
  return static_cast<uint8_t>(least < 243 ? least : 243);
}

}  // namespace lic_fast
