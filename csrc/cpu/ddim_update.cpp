// An update of a diffusion sampler, one pass; lic_fast/reference/ddim_update.py says what each element gets:
//     out = a x + b clamp(f) + noise n
// Reads x and f once and writes out once: 12 bytes an element in fp32. n is made in registers and a small block on the
// stack. Takes x, f and out contiguous in one order (row-major where there is noise), fp32, bf16 or fp64; arithmetic in
// fp32, or fp64, unfused.
#include "common/normal.h"
#include "cpu/noise.h"
#include "cpu/parallel.h"

namespace lic_fast {
namespace {

constexpr int64_t kBlock = 512;

struct Update {
  const void* x;
  const void* f;
  void* out;
  int64_t first, n;  // elements [first, first + n)
  int32_t dtype;
  bool noisy;
  int64_t seed;
  double a, b, clamp, noise;
};

// normal: the noise of these n elements, or null.
template <class T, class Acc>
LIC_FAST_INLINE void block(const Update& u, int64_t first, int64_t n, const float* normal) {
  const T* __restrict__ x = static_cast<const T*>(u.x) + first;
  const T* __restrict__ f = static_cast<const T*>(u.f) + first;
  T* __restrict__ out = static_cast<T*>(u.out) + first;
  const Acc a = static_cast<Acc>(u.a), b = static_cast<Acc>(u.b);
  const Acc most = static_cast<Acc>(u.clamp), noise = static_cast<Acc>(u.noise);
  if (normal) {
    for (int64_t i = 0; i < n; ++i) {
      const Acc value = convert<Acc>(f[i]), below = value > most ? most : value;  // NaN stays
      const Acc bounded = below < -most ? -most : below;
      out[i] = convert<T>((convert<Acc>(x[i]) * a + bounded * b) + static_cast<Acc>(normal[i]) * noise);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const Acc value = convert<Acc>(f[i]), below = value > most ? most : value;
      const Acc bounded = below < -most ? -most : below;
      out[i] = convert<T>(convert<Acc>(x[i]) * a + bounded * b);
    }
  }
}

template <class Isa, class T, class Acc>
LIC_FAST_INLINE void stretch(const Update& u) {
  if (!u.noisy) return block<T, Acc>(u, u.first, u.n, nullptr);
  alignas(64) float normal[kBlock];
  for (int64_t done = 0; done < u.n; done += kBlock) {
    const int64_t n = u.n - done < kBlock ? u.n - done : kBlock;
    noise_stretch<VectorMath<Isa>>(u.seed, u.first + done, n, normal);
    for (int64_t i = 0; i < n; ++i) normal[i] = normal_of(normal[i]);
    block<T, Acc>(u, u.first + done, n, normal);
  }
}

template <class Isa>
LIC_FAST_INLINE void run_update_body(const Update& u) {
  switch (u.dtype) {
    case kFloat32: return stretch<Isa, float, float>(u);
    case kBFloat16: return stretch<Isa, BFloat16, float>(u);
    default: return stretch<Isa, double, double>(u);
  }
}

LIC_FAST_SIMD_VARIANTS(run_update, (const Update& u), (u));

void ddim_update_out(Tensor x, Tensor f, Tensor seed, double a, double b, double clamp, double noise, Tensor out) {
  const int32_t dtype = dtype_code(x);
  STD_TORCH_CHECK(dtype == kFloat32 || dtype == kBFloat16 || dtype == kFloat64,
                  "lic_fast: ddim_update takes float32, bfloat16 and float64");
  STD_TORCH_CHECK(dtype_code(f) == dtype && dtype_code(out) == dtype && alike(x, f) && alike(x, out),
                  "lic_fast: ddim_update takes dense tensors alike");
  const bool noisy = seed.numel() != 0;
  STD_TORCH_CHECK(!noisy || x.is_contiguous(), "lic_fast: ddim_update counts noise in row-major order");
  const Update whole{x.const_data_ptr(),
                     f.const_data_ptr(),
                     out.mutable_data_ptr(),
                     0,
                     0,
                     dtype,
                     noisy,
                     noisy ? *static_cast<const int64_t*>(seed.const_data_ptr()) : 0,
                     a,
                     b,
                     clamp,
                     noise};
  torch::stable::parallel_for(0, x.numel(), kSerialElements, [&](int64_t begin, int64_t end) {
    Update part = whole;
    part.first = begin;
    part.n = end - begin;
    run_update(part);
  });
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cpp, m) {
  m.def(
      "ddim_update_out(Tensor x, Tensor f, Tensor seed, float a, float b, float clamp, float noise, Tensor(a!) out)"
      " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("ddim_update_out", TORCH_BOX(&lic_fast::ddim_update_out));
}
