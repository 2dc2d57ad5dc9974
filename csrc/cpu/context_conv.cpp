// The context convolution of an autoregressive model at one pixel: only the taps that come before it in raster order.
//
// Bound by the weights, which are read once: 2 M^2 * 12 * 4 bytes for a kernel of 5 (3.5 MB for M = 192), half of what
// a masked convolution reads, and packed once instead of at every pixel. The order of the sums is that of oneDNN's
// direct convolution on AVX-512 (found by trying orders): of 16 channels at a time, one chain of fused multiply-adds
// over taps and channels; the blocks' sums are added one after the other, the bias to the first. One thread.
#include "common/tensors.h"
#include "cpu/simd.h"

namespace lic_fast {
namespace {

constexpr int64_t kChannels = 16;  // of a block
constexpr int64_t kOutputs = 64;   // that are summed side by side

// sums[kOutputs] of one block of channels: chains over `steps` values x, weights [steps][kOutputs].
template <class Isa>
struct Chains {
  static void run(const float* weights, const float* x, int64_t steps, float* sums) {
    for (int64_t o = 0; o < kOutputs; ++o) sums[o] = 0;
    for (int64_t i = 0; i < steps; ++i) {  // not fused: without instructions for it that would take far longer
      for (int64_t o = 0; o < kOutputs; ++o) sums[o] = sums[o] + weights[i * kOutputs + o] * x[i];
    }
  }
};

#if defined(__x86_64__)
template <>
struct Chains<Avx512> {
  LIC_FAST_TARGET(LIC_FAST_AVX512)
  static void run(const float* weights, const float* x, int64_t steps, float* sums) {
    __m512 sum0 = _mm512_setzero_ps(), sum1 = sum0, sum2 = sum0, sum3 = sum0;
    for (int64_t i = 0; i < steps; ++i, weights += kOutputs) {
      const __m512 value = _mm512_set1_ps(x[i]);
      sum0 = _mm512_fmadd_ps(_mm512_loadu_ps(weights), value, sum0);
      sum1 = _mm512_fmadd_ps(_mm512_loadu_ps(weights + 16), value, sum1);
      sum2 = _mm512_fmadd_ps(_mm512_loadu_ps(weights + 32), value, sum2);
      sum3 = _mm512_fmadd_ps(_mm512_loadu_ps(weights + 48), value, sum3);
    }
    _mm512_storeu_ps(sums, sum0);
    _mm512_storeu_ps(sums + 16, sum1);
    _mm512_storeu_ps(sums + 32, sum2);
    _mm512_storeu_ps(sums + 48, sum3);
  }
};

template <>
struct Chains<Avx2> {
  LIC_FAST_TARGET(LIC_FAST_AVX2)
  static void run(const float* weights, const float* x, int64_t steps, float* sums) {
    __m256 sum[kOutputs / 8];
    for (__m256& s : sum) s = _mm256_setzero_ps();
    for (int64_t i = 0; i < steps; ++i, weights += kOutputs) {
      const __m256 value = _mm256_set1_ps(x[i]);
#pragma GCC unroll 8
      for (int64_t o = 0; o < kOutputs / 8; ++o) {
        sum[o] = _mm256_fmadd_ps(_mm256_loadu_ps(weights + 8 * o), value, sum[o]);
      }
    }
    for (int64_t o = 0; o < kOutputs / 8; ++o) _mm256_storeu_ps(sums + 8 * o, sum[o]);
  }
};
#endif

// x [blocks][steps], weights [groups][blocks][steps][kOutputs], bias and out [outputs].
template <class Isa>
LIC_FAST_INLINE void convolve_body(const float* weights, const float* x, const float* bias, int64_t blocks,
                                   int64_t steps, int64_t outputs, float* out) {
  alignas(64) float sums[kOutputs];
  for (int64_t first = 0; first < outputs; first += kOutputs) {
    const int64_t n = std::min(kOutputs, outputs - first);
    for (int64_t o = 0; o < n; ++o) out[first + o] = bias ? bias[first + o] : 0.0f;
    for (int64_t block = 0; block < blocks; ++block, weights += steps * kOutputs) {
      Chains<Isa>::run(weights, x + block * steps, steps, sums);
      for (int64_t o = 0; o < n; ++o) out[first + o] = sums[o] + out[first + o];
    }
  }
}

LIC_FAST_SIMD_VARIANTS(convolve,
                       (const float* weights, const float* x, const float* bias, int64_t blocks, int64_t steps,
                        int64_t outputs, float* out),
                       (weights, x, bias, blocks, steps, outputs, out));

// crop [1, C, k, k] fp32 of any strides, packed [groups, blocks, taps, 16, 64], bias [O] or none, out [1, O, 1, 1].
void context_conv_out(Tensor crop, Tensor packed, std::optional<Tensor> bias, Tensor out) {
  const int64_t channels = crop.size(1), side = crop.size(2), outputs = out.numel();
  const int64_t taps = side * side / 2, blocks = (channels + kChannels - 1) / kChannels, steps = taps * kChannels;
  const int64_t groups = (outputs + kOutputs - 1) / kOutputs;
  STD_TORCH_CHECK(crop.size(0) == 1 && crop.size(3) == side && packed.is_contiguous() && out.is_contiguous() &&
                      packed.numel() == groups * blocks * steps * kOutputs && dtype_code(crop) == kFloat32 &&
                      dtype_code(packed) == kFloat32 && dtype_code(out) == kFloat32,
                  "context_conv: weights that were packed for other shapes");
  if (bias) check_same_numel(*bias, out);
  std::vector<float> x(blocks * steps);
  const float* from = static_cast<const float*>(crop.const_data_ptr());
  for (int64_t c = 0; c < channels; ++c) {
    float* to = x.data() + c / kChannels * steps + c % kChannels;
    for (int64_t t = 0; t < taps; ++t) {
      to[t * kChannels] = from[c * crop.stride(1) + t / side * crop.stride(2) + t % side * crop.stride(3)];
    }
  }
  convolve(static_cast<const float*>(packed.const_data_ptr()), x.data(),
           bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr, blocks, steps, outputs,
           static_cast<float*>(out.mutable_data_ptr()));
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cpp, m) {
  m.def("context_conv_out(Tensor crop, Tensor packed, Tensor? bias, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("context_conv_out", TORCH_BOX(&lic_fast::context_conv_out));
}
