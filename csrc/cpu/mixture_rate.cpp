// Rates of a latent under Gaussian, logistic or Laplace densities, alone or mixed, and their derivatives in one pass.
//
// Evaluating a density costs more here than memory does: where gradients will be asked for, the forward pass leaves the
// derivatives (mixture_rate.h), and backward only multiplies them. One component, fp32, noise: forward reads y, scales
// and means, writes y_hat, the rate and two slopes (4 bytes each); backward reads the slopes and the two
// upstream gradients and writes three gradients. Work is cut into stretches of one sample, whatever the number of
// threads; sums per channel are fp64 over a stretch in the order of its elements, then over the stretches in theirs.
// Formulas: common/likelihood.h. Takes fp32 and bf16 (arithmetic in fp32, by vectors) and fp64 (by libm); samples dense
// and row-major at any distance.
#include "cpu/mixture_rate.h"
#include "cpu/mixture_rate_bwd.h"

#include "cpu/parallel.h"

namespace lic_fast {
namespace {

constexpr int64_t kStretch = 1 << 12;
constexpr int64_t kStreamed = int64_t{24} << 20;  // bytes

template <class Isa>
LIC_FAST_INLINE void forward_stretch_body(const MixtureJob& job, const Stretch& at) {
  forward_by_type<Isa, false>(job, at);
}
template <class Isa>
LIC_FAST_INLINE void slopes_stretch_body(const MixtureJob& job, const Stretch& at) {
  forward_by_type<Isa, true>(job, at);
}
template <class Isa>
LIC_FAST_INLINE void backward_stretch_body(const GradientJob& job, const Stretch& at) {
  backward_by_type<Isa>(job, at);
}
LIC_FAST_SIMD_VARIANTS(forward_stretch, (const MixtureJob& job, const Stretch& at), (job, at));
LIC_FAST_SIMD_VARIANTS(slopes_stretch, (const MixtureJob& job, const Stretch& at), (job, at));
LIC_FAST_SIMD_VARIANTS(backward_stretch, (const GradientJob& job, const Stretch& at), (job, at));

// How the elements of a sample are cut: pieces of rows too long for a stretch, else as many whole rows as fit.
struct Cut {
  template <class Job>
  explicit Cut(const Job& job)
      : row(job.output == kBitsPerChannel ? job.inner : job.sample),
        pieces((row + kStretch - 1) / kStretch),
        rows(pieces > 1 ? 1 : kStretch / row),
        per_sample((job.sample / row + rows - 1) / rows * pieces) {}

  template <class Job>
  Stretch stretch(const Job& job, int64_t unit) const {
    const int64_t b = unit / per_sample, own = unit % per_sample;
    const int64_t first_row = own / pieces * rows, piece = own % pieces;
    const int64_t begin = first_row * row + piece * kStretch;
    const int64_t rows_end = std::min(job.sample, (first_row + rows) * row);
    const int64_t end = pieces > 1 ? std::min(rows_end, begin + kStretch) : rows_end;
    return {b, begin, end, (b * (job.sample / row) + first_row) * pieces + piece};
  }

  int64_t row, pieces, rows, per_sample;
};

template <class Job, class Body>
void over_stretches(const Job& job, const Cut& cut, const Body& body) {
  const int64_t units = job.batch * cut.per_sample;
  const int64_t elements = std::max<int64_t>(1, job.sample / cut.per_sample);
  const int64_t grain = std::max<int64_t>(1, kSerialElements / elements);
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) body(cut.stretch(job, unit));
  });
}

const void* data(const std::optional<Tensor>& tensor) {
  return tensor && tensor->numel() ? tensor->const_data_ptr() : nullptr;
}
void* room(const Tensor& tensor) { return tensor.numel() ? tensor.mutable_data_ptr() : nullptr; }

MixtureJob make_job(const Tensor& y, const Tensor& scales, const std::optional<Tensor>& means,
                    const std::optional<Tensor>& weights, const std::optional<Tensor>& seed,
                    const std::vector<int64_t>& families, int64_t quantize, double scale_bound, double likelihood_bound,
                    bool logits, int64_t output) {
  const int64_t k = static_cast<int64_t>(families.size());
  STD_TORCH_CHECK(k >= 1 && k <= kMostComponents, "mixture_rate: 1 to 16 components, got ", k);
  STD_TORCH_CHECK(y.dim() >= 2 && y.numel() > 0, "mixture_rate: y must be [B, C, *] and not empty");
  STD_TORCH_CHECK(weights ? means.has_value() : k == 1, "mixture_rate: a mixture needs means and weights");
  STD_TORCH_CHECK(quantize != kNoise || seed, "mixture_rate: noise needs a seed");
  MixtureJob job{};
  job.type = dtype_code(y);
  STD_TORCH_CHECK(job.type == kFloat32 || job.type == kBFloat16 || job.type == kFloat64,
                  "mixture_rate: a dtype that the C++ kernel does not read");
  job.batch = y.size(0);
  job.sample = y.numel() / job.batch;
  job.inner = job.sample / y.size(1);
  const auto input = [&](const Tensor& tensor, int64_t components) {
    STD_TORCH_CHECK(tensor.numel() == components * y.numel() && tensor.scalar_type() == y.scalar_type(),
                    "mixture_rate: parameters must fit y in shape and dtype");
    return Input{tensor.const_data_ptr(), job.batch > 1 ? tensor.stride(0) : 0};
  };
  job.y = input(y, 1);
  job.scales = input(scales, k);
  if (means) job.means = input(*means, k);
  if (weights) job.weights = input(*weights, k);
  job.components = k;
  for (int64_t i = 0; i < k; ++i) job.families[i] = static_cast<int32_t>(families[i]);
  if (seed) job.seed = *static_cast<const int64_t*>(seed->const_data_ptr());
  job.quantize = static_cast<int32_t>(quantize);
  job.output = static_cast<int32_t>(output);
  job.logits = logits;
  job.scale_bound = scale_bound;
  job.likelihood_bound = likelihood_bound;
  return job;
}

template <class T>
void add_pieces(const std::vector<double>& sums, int64_t pieces, void* rate) {
  const int64_t rows = static_cast<int64_t>(sums.size()) / pieces;
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (int64_t p = 0; p < pieces; ++p) sum += sums[r * pieces + p];
    static_cast<T*>(rate)[r] = static_cast<T>(sum);
  }
}

// Whether results are too large for the caches together, and lie so that every vector of them can go past these.
bool streams(int64_t sample, std::initializer_list<Tensor> results) {
  bool aligned = sample % 16 == 0;
  int64_t bytes = 0;
  for (const Tensor& result : results) {
    aligned = aligned && reinterpret_cast<uintptr_t>(result.numel() ? result.const_data_ptr() : nullptr) % 64 == 0;
    bytes += result.numel() * result.element_size();
  }
  return aligned && bytes >= kStreamed;
}

void forward(const MixtureJob& job, const Cut& cut) {
  over_stretches(job, cut, [&](const Stretch& at) { job.slopes ? slopes_stretch(job, at) : forward_stretch(job, at); });
}

int64_t planes(const MixtureJob& job) { return (job.weights.data ? 3 : 2) * job.components; }

void mixture_rate_out(Tensor y, Tensor scales, std::optional<Tensor> means, std::optional<Tensor> weights,
                      std::optional<Tensor> seed, std::vector<int64_t> families, int64_t quantize, double scale_bound,
                      double likelihood_bound, bool logits, int64_t output, Tensor y_hat, Tensor rate, Tensor slopes) {
  MixtureJob job =
      make_job(y, scales, means, weights, seed, families, quantize, scale_bound, likelihood_bound, logits, output);
  STD_TORCH_CHECK(y_hat.numel() == (quantize == kNotQuantized ? 0 : y.numel()), "mixture_rate: y_hat's size");
  STD_TORCH_CHECK(rate.numel() == (output == kBitsPerChannel ? job.batch * y.size(1) : y.numel()),
                  "mixture_rate: the rate's size");
  STD_TORCH_CHECK(slopes.numel() == 0 || slopes.numel() == planes(job) * y.numel(), "mixture_rate: the slopes' size");
  job.y_hat = room(y_hat);
  job.slopes = room(slopes);
  job.streams = streams(job.sample, {slopes});
  const Cut cut(job);
  std::vector<double> sums;
  if (output == kBitsPerChannel) {
    sums.resize(job.batch * (job.sample / cut.row) * cut.pieces);
    job.sums = sums.data();
  } else {
    job.rate = room(rate);
  }
  forward(job, cut);
  if (!job.sums) return;
  if (job.type == kFloat64) {
    add_pieces<double>(sums, cut.pieces, rate.mutable_data_ptr());
  } else {
    add_pieces<float>(sums, cut.pieces, rate.mutable_data_ptr());
  }
}

// slopes without elements: they are made here.
void mixture_rate_bwd_out(std::optional<Tensor> grad_y_hat, std::optional<Tensor> grad_rate, Tensor slopes, Tensor y,
                          Tensor scales, std::optional<Tensor> means, std::optional<Tensor> weights,
                          std::optional<Tensor> seed, std::vector<int64_t> families, int64_t quantize,
                          double scale_bound, double likelihood_bound, bool logits, int64_t output, Tensor grad_y,
                          Tensor grad_scales, Tensor grad_means, Tensor grad_weights) {
  MixtureJob whole =
      make_job(y, scales, means, weights, seed, families, quantize, scale_bound, likelihood_bound, logits, output);
  if (slopes.numel() == 0) {
    const bool wide = whole.type == kFloat64;
    slopes = torch::stable::new_empty(y, {planes(whole), y.numel()}, wide ? ScalarType::Double : ScalarType::Float);
    whole.slopes = slopes.mutable_data_ptr();
    forward(whole, Cut(whole));
  }
  STD_TORCH_CHECK(slopes.numel() == planes(whole) * y.numel(), "mixture_rate: the slopes' size");
  const auto upstream = [](const std::optional<Tensor>& grad, int64_t all) {
    const int64_t n = grad ? grad->numel() : 1;
    STD_TORCH_CHECK(n == 1 || n == all, "mixture_rate: the size of an upstream gradient");
    return Upstream{data(grad), grad && n == 1 && all != 1};
  };
  GradientJob job{};
  job.slopes = slopes.const_data_ptr();
  job.batch = whole.batch, job.sample = whole.sample, job.inner = whole.inner, job.components = whole.components;
  job.type = whole.type, job.quantize = whole.quantize, job.output = whole.output;
  job.mixed = whole.weights.data != nullptr;
  job.likelihood_bound = likelihood_bound;
  if (quantize != kNotQuantized) job.grad_y_hat = upstream(grad_y_hat, y.numel());
  job.grad_rate = upstream(grad_rate, output == kBitsPerChannel ? job.batch * y.size(1) : y.numel());
  job.grad_y = room(grad_y), job.grad_scales = room(grad_scales);
  job.grad_means = room(grad_means), job.grad_weights = room(grad_weights);
  job.streams = streams(job.sample, {grad_y, grad_scales, grad_means, grad_weights});
  over_stretches(job, Cut(job), [&](const Stretch& at) { backward_stretch(job, at); });
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cpp, m) {
  m.def(
      "mixture_rate_out(Tensor y, Tensor scales, Tensor? means, Tensor? weights, Tensor? seed, int[] families, "
      "int quantize, float scale_bound, float likelihood_bound, bool logits, int output, Tensor(a!) y_hat, "
      "Tensor(b!) rate, Tensor(c!) slopes) -> ()");
  m.def(
      "mixture_rate_bwd_out(Tensor? grad_y_hat, Tensor? grad_rate, Tensor slopes, Tensor y, Tensor scales, "
      "Tensor? means, Tensor? weights, Tensor? seed, int[] families, int quantize, float scale_bound, float "
      "likelihood_bound, "
      "bool logits, int output, Tensor(a!) grad_y, Tensor(b!) grad_scales, Tensor(c!) grad_means, "
      "Tensor(d!) grad_weights) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("mixture_rate_out", TORCH_BOX(&lic_fast::mixture_rate_out));
  m.impl("mixture_rate_bwd_out", TORCH_BOX(&lic_fast::mixture_rate_bwd_out));
}
