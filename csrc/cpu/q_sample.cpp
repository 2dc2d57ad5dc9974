// The noising of diffusion training, its weighted loss and the gradient; lic_fast/reference/q_sample.py says what each
// element gets:
//     noisy = signal x + spread n;   loss = mean of weight e^2, or weight |e|,  e = f - target;   d_f = scale e
// A pass each. n, and a target that is n, are made in registers and a small block on the stack: with the noise as its
// target the loss reads 4 bytes an element in fp32, and its gradient reads 4 and writes 4. Takes tensors [B, *] dense,
// one sample after the other and in one order (row-major where there is noise), fp32, bf16 or fp64; arithmetic in fp32,
// or fp64, unfused. A thread takes stretches of a sample; the loss adds a stretch by lanes, blocks and stretches in
// fp64, in an order that depends on the shape alone.
#include <memory>

#include "common/normal.h"
#include "cpu/noise.h"
#include "cpu/parallel.h"
#include "cpu/sums.h"

namespace lic_fast {
namespace {

constexpr int64_t kBlock = 512;
constexpr int64_t kStretch = 1 << 14;

enum class Job { kNoising, kLoss, kGradient };

struct Part {
  Job job;
  const void* f;  // x of kNoising
  const void* x;  // the target, or null: the noise
  void* out;
  int64_t first, n;  // elements [first, first + n) of one sample
  int32_t dtype;
  int64_t seed;
  bool noisy, absolute;
  double a, b;  // kNoising: signal and spread; kGradient: the scale
  double sum;   // kLoss: to be written
};

template <class T, class Acc>
LIC_FAST_INLINE void noising(const Part& p, int64_t done, int64_t n, const float* normal) {
  const T* __restrict__ x = static_cast<const T*>(p.f) + p.first + done;
  T* __restrict__ out = static_cast<T*>(p.out) + p.first + done;
  const Acc signal = static_cast<Acc>(p.a), spread = static_cast<Acc>(p.b);
  for (int64_t i = 0; i < n; ++i) {
    out[i] = convert<T>(convert<Acc>(x[i]) * signal + static_cast<Acc>(normal[i]) * spread);
  }
}

// error[0, n) of a block; normal: the noise of these elements, or null.
template <class T, class Acc>
LIC_FAST_INLINE void errors(const Part& p, int64_t done, int64_t n, const float* normal, Acc* __restrict__ error) {
  const T* __restrict__ f = static_cast<const T*>(p.f) + p.first + done;
  if (normal) {
    for (int64_t i = 0; i < n; ++i) error[i] = convert<Acc>(f[i]) - static_cast<Acc>(normal[i]);
  } else {
    const T* __restrict__ x = static_cast<const T*>(p.x) + p.first + done;
    for (int64_t i = 0; i < n; ++i) error[i] = convert<Acc>(f[i]) - convert<Acc>(x[i]);
  }
}

template <class T, class Acc>
LIC_FAST_INLINE void gradient(const Part& p, int64_t done, int64_t n, const Acc* __restrict__ error) {
  T* __restrict__ out = static_cast<T*>(p.out) + p.first + done;
  const Acc scale = static_cast<Acc>(p.a);
  if (p.absolute) {
    for (int64_t i = 0; i < n; ++i) {
      const Acc e = error[i], below = e < Acc(0) ? Acc(-1) : e;  // NaN and 0 stay
      out[i] = convert<T>((e > Acc(0) ? Acc(1) : below) * scale);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = convert<T>(error[i] * scale);
  }
}

// What a block adds to the sum; error has room for whole lanes.
template <class Acc>
LIC_FAST_INLINE double block_sum(const Part& p, int64_t n, Acc* __restrict__ error) {
  for (int64_t i = n; i < padded_for_sums(n); ++i) error[i] = Acc(0);
  if (!p.absolute) return static_cast<double>(sum_of<Acc>(n, error, error));
  for (int64_t i = 0; i < n; ++i) error[i] = error[i] < Acc(0) ? -error[i] : error[i];
  return static_cast<double>(sum_of<Acc>(n, error, nullptr));
}

template <class Isa, class T, class Acc>
LIC_FAST_INLINE void stretch(Part& p) {
  alignas(64) float normal[kBlock];
  alignas(64) Acc error[kBlock];
  double sum = 0;
  for (int64_t done = 0; done < p.n; done += kBlock) {
    const int64_t n = p.n - done < kBlock ? p.n - done : kBlock;
    if (p.noisy) {
      noise_stretch<VectorMath<Isa>>(p.seed, p.first + done, n, normal);
      for (int64_t i = 0; i < n; ++i) normal[i] = normal_of(normal[i]);
    }
    if (p.job == Job::kNoising) {
      noising<T, Acc>(p, done, n, normal);
      continue;
    }
    errors<T, Acc>(p, done, n, p.noisy ? normal : nullptr, error);
    if (p.job == Job::kLoss) {
      sum += block_sum<Acc>(p, n, error);
    } else {
      gradient<T, Acc>(p, done, n, error);
    }
  }
  p.sum = sum;
}

template <class Isa>
LIC_FAST_INLINE void run_part_body(Part& p) {
  switch (p.dtype) {
    case kFloat32: return stretch<Isa, float, float>(p);
    case kBFloat16: return stretch<Isa, BFloat16, float>(p);
    default: return stretch<Isa, double, double>(p);
  }
}

LIC_FAST_SIMD_VARIANTS(run_part, (Part & p), (p));

// A tensor of one number a sample, of the arithmetic's dtype.
class Column {
 public:
  Column(const Tensor& values, const Tensor& like) : data_(values.const_data_ptr()), wide_(values.element_size() == 8) {
    STD_TORCH_CHECK(values.is_contiguous() && values.numel() == like.size(0) &&
                        dtype_code(values) == (dtype_code(like) == kFloat64 ? kFloat64 : kFloat32),
                    "lic_fast: q_sample takes one number a sample, of the arithmetic's dtype");
  }
  double at(int64_t i) const {
    return wide_ ? static_cast<const double*>(data_)[i] : static_cast<const float*>(data_)[i];
  }

 private:
  const void* data_;
  bool wide_;
};

// The job of all samples; x and seed may be empty.
Part whole(Job job, const Tensor& f, const Tensor* x, const Tensor& seed, bool absolute, const Tensor* out) {
  const int32_t dtype = dtype_code(f);
  STD_TORCH_CHECK(dtype == kFloat32 || dtype == kBFloat16 || dtype == kFloat64,
                  "lic_fast: q_sample takes float32, bfloat16 and float64");
  STD_TORCH_CHECK(f.dim() >= 1 && is_dense(f), "lic_fast: q_sample takes dense tensors [B, *]");
  const bool noisy = seed.numel() != 0, targeted = x && x->numel() != 0;
  STD_TORCH_CHECK(noisy ? f.is_contiguous() && !targeted : f.numel() == 0 || targeted,
                  "lic_fast: q_sample takes noise, counted in row-major order, or a target");
  for (const Tensor* t : {targeted ? x : nullptr, out}) {
    STD_TORCH_CHECK(!t || (dtype_code(*t) == dtype && alike(f, *t)), "lic_fast: q_sample takes dense tensors alike");
  }
  return {job,
          f.const_data_ptr(),
          targeted ? x->const_data_ptr() : nullptr,
          out ? out->mutable_data_ptr() : nullptr,
          0,
          0,
          dtype,
          noisy ? *static_cast<const int64_t*>(seed.const_data_ptr()) : 0,
          noisy,
          absolute,
          0,
          0,
          0};
}

// Calls body(part, sample, stretch) for all stretches of all samples; body completes the part and runs it.
template <class Body>
void over_stretches(const Tensor& f, const Part& whole, const Body& body) {
  if (f.numel() == 0) return;
  const int64_t n = f.numel() / f.size(0), stretches = (n + kStretch - 1) / kStretch;
  const int64_t grain = std::max<int64_t>(1, kSerialElements / std::min(n, kStretch));
  torch::stable::parallel_for(0, f.size(0) * stretches, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t sample = t / stretches, start = t % stretches * kStretch;
      Part part = whole;
      part.first = sample * n + start;
      part.n = std::min(kStretch, n - start);
      body(part, sample, t);
    }
  });
}

void q_sample_out(Tensor x, Tensor signal, Tensor spread, Tensor seed, Tensor out) {
  STD_TORCH_CHECK(seed.numel() == 1, "lic_fast: q_sample takes a seed");
  const Column by_x(signal, x), by_noise(spread, x);
  over_stretches(x, whole(Job::kNoising, x, nullptr, seed, false, &out), [&](Part part, int64_t sample, int64_t) {
    part.a = by_x.at(sample);
    part.b = by_noise.at(sample);
    run_part(part);
  });
}

void q_sample_loss_out(Tensor f, Tensor x, Tensor weight, Tensor seed, bool absolute, Tensor loss) {
  const Column weights(weight, f);
  const Part all = whole(Job::kLoss, f, &x, seed, absolute, nullptr);
  const int64_t samples = f.size(0), n = samples ? f.numel() / samples : 0;
  const int64_t stretches = (n + kStretch - 1) / kStretch;
  const std::unique_ptr<double[]> sums(new double[samples * stretches + 1]);
  over_stretches(f, all, [&](Part part, int64_t, int64_t t) {
    run_part(part);
    sums[t] = part.sum;
  });
  double total = 0;
  for (int64_t b = 0; b < samples; ++b) {
    double sum = 0;
    for (int64_t t = 0; t < stretches; ++t) sum += sums[b * stretches + t];
    total += weights.at(b) * sum;
  }
  total /= static_cast<double>(f.numel());
  if (dtype_code(loss) == kFloat64) {
    *static_cast<double*>(loss.mutable_data_ptr()) = total;
  } else {
    *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(total);
  }
}

void q_sample_loss_bwd_out(Tensor f, Tensor x, Tensor scale, Tensor seed, bool absolute, Tensor d_f) {
  const Column scales(scale, f);
  over_stretches(f, whole(Job::kGradient, f, &x, seed, absolute, &d_f), [&](Part part, int64_t sample, int64_t) {
    part.a = scales.at(sample);
    run_part(part);
  });
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cpp, m) {
  m.def("q_sample_out(Tensor x, Tensor signal, Tensor spread, Tensor seed, Tensor(a!) out) -> ()");
  m.def("q_sample_loss_out(Tensor f, Tensor x, Tensor weight, Tensor seed, bool absolute, Tensor(a!) loss) -> ()");
  m.def("q_sample_loss_bwd_out(Tensor f, Tensor x, Tensor scale, Tensor seed, bool absolute, Tensor(a!) d_f) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("q_sample_out", TORCH_BOX(&lic_fast::q_sample_out));
  m.impl("q_sample_loss_out", TORCH_BOX(&lic_fast::q_sample_loss_out));
  m.impl("q_sample_loss_bwd_out", TORCH_BOX(&lic_fast::q_sample_loss_bwd_out));
}
