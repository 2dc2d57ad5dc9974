// Steps of a latent's schedule: elements of a strided slice of y [B, C, H, W] to symbols and levels, and back.
//
// Memory bound: quantising reads y (a stride apart), scale and mean and writes symbol, level, value and y_hat, 25 bytes
// an element and the rest of the lines of y and y_hat; dequantising 16 bytes and those lines; levels 5 bytes.
#include <cmath>

#include "common/schedule.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace lic_fast {
namespace {

struct Row {
  const float *y, *scales, *means;
  float *y_hat, *values;
  int32_t* symbols;
  uint8_t* levels;
  int64_t n, stride;
};

template <class Isa>
LIC_FAST_INLINE void levels_row_body(const float* __restrict__ scales, uint8_t* __restrict__ levels, int64_t n) {
  for (int64_t j = 0; j < n; ++j) levels[j] = level_of_scale(scales[j]);
}
LIC_FAST_SIMD_VARIANTS(levels_row, (const float* __restrict__ scales, uint8_t* __restrict__ levels, int64_t n),
                       (scales, levels, n));

template <class Isa>
LIC_FAST_INLINE void quantize_row_body(const Row& row) {
  const float* __restrict__ y = row.y, * __restrict__ means = row.means;
  float* __restrict__ values = row.values, * __restrict__ y_hat = row.y_hat;
  int32_t* __restrict__ symbols = row.symbols;
  for (int64_t j = 0; j < row.n; ++j) {
    float rounded = __builtin_rintf(y[j * row.stride] - means[j]);
    rounded = rounded > -kMostSymbol ? rounded : -kMostSymbol;  // NaN too
    rounded = rounded < kMostSymbol ? rounded : kMostSymbol;
    symbols[j] = static_cast<int32_t>(rounded);
    values[j] = rounded + means[j];
  }
  for (int64_t j = 0; j < row.n; ++j) y_hat[j * row.stride] = values[j];
}
LIC_FAST_SIMD_VARIANTS(quantize_row, (const Row& row), (row));

template <class Isa>
LIC_FAST_INLINE void dequantize_row_body(const Row& row) {
  const float* __restrict__ means = row.means;
  const int32_t* __restrict__ symbols = row.symbols;
  float* __restrict__ values = row.values, * __restrict__ y_hat = row.y_hat;
  for (int64_t j = 0; j < row.n; ++j) values[j] = static_cast<float>(symbols[j]) + means[j];
  for (int64_t j = 0; j < row.n; ++j) y_hat[j * row.stride] = values[j];
}
LIC_FAST_SIMD_VARIANTS(dequantize_row, (const Row& row), (row));

template <class Body>
void for_rows(const Step& step, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kSerialElements / std::max<int64_t>(1, step.w));
  torch::stable::parallel_for(0, step.rows(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) body(r);
  });
}

// y_hat, y fp32 [B, C, H, W]; parameters fp32 [B, 2 c, h, w]; symbols int32, levels uint8, values fp32 [B, c, h, w].
bool schedule_quantize_(Tensor y_hat, Tensor y, Tensor parameters, Tensor symbols, Tensor levels, Tensor values,
                        int64_t first, int64_t row, int64_t column, int64_t stride) {
  Step step{};
  step.first = first, step.row = row, step.column = column, step.stride = stride;
  if (!is_step(y_hat, symbols, parameters, &step) || !alike(y_hat, y)) return false;
  if (!alike(symbols, levels) || !alike(symbols, values)) return false;
  const float* from = static_cast<const float*>(y.const_data_ptr());
  const float* given = static_cast<const float*>(parameters.const_data_ptr());
  float* to = static_cast<float*>(y_hat.mutable_data_ptr());
  float* value = static_cast<float*>(values.mutable_data_ptr());
  int32_t* symbol = static_cast<int32_t*>(symbols.mutable_data_ptr());
  uint8_t* level = static_cast<uint8_t*>(levels.mutable_data_ptr());
  for_rows(step, [&](int64_t r) {
    const int64_t at = step.in_latent(r), out = r * step.w;
    const float* scales = given + step.in_scales(r);
    levels_row(scales, level + out, step.w);
    quantize_row({from + at, scales, scales + step.to_means(), to + at, value + out, symbol + out, nullptr, step.w,
                  step.stride});
  });
  return true;
}

bool schedule_dequantize_(Tensor y_hat, Tensor symbols, Tensor parameters, Tensor values, int64_t first, int64_t row,
                          int64_t column, int64_t stride) {
  Step step{};
  step.first = first, step.row = row, step.column = column, step.stride = stride;
  if (!is_step(y_hat, symbols, parameters, &step) || !alike(symbols, values)) return false;
  const float* given = static_cast<const float*>(parameters.const_data_ptr());
  float* to = static_cast<float*>(y_hat.mutable_data_ptr());
  float* value = static_cast<float*>(values.mutable_data_ptr());
  int32_t* symbol = static_cast<int32_t*>(const_cast<void*>(symbols.const_data_ptr()));
  for_rows(step, [&](int64_t r) {
    const int64_t out = r * step.w;
    dequantize_row({nullptr, nullptr, given + step.in_scales(r) + step.to_means(), to + step.in_latent(r), value + out,
                    symbol + out, nullptr, step.w, step.stride});
  });
  return true;
}

// parameters fp32 [B, 2 c, h, w], levels uint8 [B, c, h, w], contiguous
bool schedule_levels_out(Tensor parameters, Tensor levels) {
  if (!parameters.is_contiguous() || !levels.is_contiguous() || parameters.numel() != 2 * levels.numel()) return false;
  if (levels.numel() == 0) return true;
  const int64_t samples = levels.size(0), n = levels.numel() / samples;
  const float* given = static_cast<const float*>(parameters.const_data_ptr());
  uint8_t* level = static_cast<uint8_t*>(levels.mutable_data_ptr());
  torch::stable::parallel_for(0, samples * n, kSerialElements, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t stop = std::min(end, (begin / n + 1) * n);
      levels_row(given + begin + begin / n * n, level + begin, stop - begin);
      begin = stop;
    }
  });
  return true;
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cpp, m) {
  m.def(
      "schedule_quantize_(Tensor(a!) y_hat, Tensor y, Tensor parameters, Tensor(b!) symbols, Tensor(c!) levels,"
      " Tensor(d!) values, int first, int row, int column, int stride) -> bool");
  m.def(
      "schedule_dequantize_(Tensor(a!) y_hat, Tensor symbols, Tensor parameters, Tensor(b!) values, int first,"
      " int row, int column, int stride) -> bool");
  m.def("schedule_levels_out(Tensor parameters, Tensor(a!) levels) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("schedule_quantize_", TORCH_BOX(&lic_fast::schedule_quantize_));
  m.impl("schedule_dequantize_", TORCH_BOX(&lic_fast::schedule_dequantize_));
  m.impl("schedule_levels_out", TORCH_BOX(&lic_fast::schedule_levels_out));
}
