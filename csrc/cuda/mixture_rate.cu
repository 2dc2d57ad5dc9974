// Rates of a latent under Gaussian, logistic or Laplace densities, alone or mixed, and their gradients: one
// element-wise kernel each way.
//
// A thread owns four neighbours: one block of Philox, accesses of 16 bytes where addresses and sample sizes allow.
// Forward, one component, fp32, noise: reads y, scales and means, writes y_hat and the rate, 20 bytes an element;
// backward reads those three and two upstream gradients and writes three, 32 bytes. The noise is made again, nothing is
// kept. Two to four components live in registers, more in local memory. Sums per channel: the lanes of a row (a warp,
// or a block for long rows) each add in fp64 what they own, then a fixed tree: no atomics, the same sum at every
// launch. Formulas: common/likelihood.h; expf, expm1f and logf in full precision. y_hat is unfused.
#include <algorithm>

#include "cuda/mixture_rate.cuh"

namespace lic_fast {
namespace {

struct Launch {
  Job job;
  int32_t type;
  cudaStream_t stream;
};

// run<T, kMost, kFamily> for the tensors' dtype, and for what is mixed. Few components, all Gaussian or not, have
// kernels of their own, but in fp64.
template <class T, class Run>
void by_form(const Job& job, const Run& run) {
  constexpr int32_t kMany = kMostComponents;
  if (!job.weights.data) {
    switch (job.families[0]) {
      case kGaussian: return run.template operator()<T, kAlone, kGaussian>();
      case kLogistic: return run.template operator()<T, kAlone, kLogistic>();
      default: return run.template operator()<T, kAlone, kLaplace>();
    }
  }
  if constexpr (!std::is_same_v<T, double>) {
    const int32_t* end = job.families + job.components;
    const bool gaussian = std::all_of(job.families, end, [](int32_t family) { return family == kGaussian; });
    switch (gaussian ? job.components : -job.components) {
      case 2: return run.template operator()<T, 2, kGaussian>();
      case 3: return run.template operator()<T, 3, kGaussian>();
      case 4: return run.template operator()<T, 4, kGaussian>();
      case -2: return run.template operator()<T, 2, kAnyFamily>();
      case -3: return run.template operator()<T, 3, kAnyFamily>();
      case -4: return run.template operator()<T, 4, kAnyFamily>();
      default: break;
    }
  }
  run.template operator()<T, kMany, kAnyFamily>();
}

template <class Run>
void by_type(const Launch& launch, const Run& run) {
  switch (launch.type) {
    case kFloat32: return by_form<float>(launch.job, run);
    case kBFloat16: return by_form<__nv_bfloat16>(launch.job, run);
    case kFloat16: return by_form<__half>(launch.job, run);
    default: return by_form<double>(launch.job, run);
  }
}

dim3 grid_of(const Job& job) {
  const int64_t groups = (job.sample + 3) / 4, blocks = (groups + kThreads - 1) / kThreads;
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, "mixture_rate: a sample of too many elements");
  return dim3(static_cast<uint32_t>(blocks), static_cast<uint32_t>(std::min(job.batch, kMostBlocks)));
}

// Counts against vectors of four what lies at an odd address or distance.
struct Alignment {
  bool all;
  const void* read(const Tensor& tensor) { return seen(tensor.const_data_ptr(), tensor); }
  void* written(const Tensor& tensor) {
    if (tensor.numel() == 0) return nullptr;
    seen(tensor.const_data_ptr(), tensor);
    return tensor.mutable_data_ptr();
  }
  const void* seen(const void* data, const Tensor& tensor) {
    all = all && aligned4(data, tensor.element_size());
    return data;
  }
};

Launch make_launch(const Tensor& y, const Tensor& scales, const std::optional<Tensor>& means,
                   const std::optional<Tensor>& weights, const std::optional<Tensor>& seed,
                   const std::vector<int64_t>& families, int64_t quantize, double scale_bound, double likelihood_bound,
                   bool logits, int64_t output, Alignment& aligned) {
  const int64_t k = static_cast<int64_t>(families.size());
  STD_TORCH_CHECK(k >= 1 && k <= kMostComponents, "mixture_rate: 1 to 16 components, got ", k);
  STD_TORCH_CHECK(y.dim() >= 2 && y.numel() > 0, "mixture_rate: y must be [B, C, *] and not empty");
  STD_TORCH_CHECK(k == 1 || (means && weights), "mixture_rate: a mixture needs means and weights");
  STD_TORCH_CHECK(!weights || means, "mixture_rate: a mixture needs means");
  STD_TORCH_CHECK(quantize != kNoise || seed, "mixture_rate: noise needs a seed");
  Launch launch{};
  Job& job = launch.job;
  launch.type = dtype_code(y);
  STD_TORCH_CHECK(launch.type >= kFloat32 && launch.type <= kFloat16, "mixture_rate: a dtype that no kernel reads");
  launch.stream = current_stream(y);
  job.batch = y.size(0);
  job.sample = y.numel() / job.batch;
  job.channels = y.size(1);
  job.inner = job.sample / job.channels;
  job.inverse_inner = UINT64_MAX / static_cast<uint64_t>(job.inner);
  aligned.all = job.sample % 4 == 0;
  const auto input = [&](const Tensor& tensor, int64_t components) {
    STD_TORCH_CHECK(tensor.numel() == components * y.numel() && tensor.scalar_type() == y.scalar_type(),
                    "mixture_rate: parameters must fit y in shape and dtype");
    const int64_t stride = job.batch > 1 ? tensor.stride(0) : 0;
    aligned.all = aligned.all && stride % 4 == 0;
    return Input{aligned.read(tensor), stride};
  };
  job.y = input(y, 1);
  job.scales = input(scales, k);
  if (means) job.means = input(*means, k);
  if (weights) job.weights = input(*weights, k);
  job.components = k;
  for (int64_t i = 0; i < k; ++i) job.families[i] = static_cast<int32_t>(families[i]);
  if (seed) job.seed = static_cast<const int64_t*>(seed->const_data_ptr());
  job.quantize = static_cast<int32_t>(quantize);
  job.output = static_cast<int32_t>(output);
  job.logits = logits;
  job.scale_bound = scale_bound;
  job.likelihood_bound = likelihood_bound;
  return launch;
}

// Sums over the rows: at once, or by parts and then over these.
void rows_out(const Launch& launch, const Tensor& y, double likelihood_bound) {
  const Job& job = launch.job;
  const int64_t parts = (job.inner + kPart - 1) / kPart, rows = job.batch * job.channels;
  const int64_t lanes = job.inner >= kLongRow ? kThreads : 32, per_block = kThreads / lanes;
  const int64_t blocks = (job.channels * parts + per_block - 1) / per_block;
  STD_TORCH_CHECK(job.channels * parts < int64_t{1} << 31, "mixture_rate: a sample of too many elements");
  const dim3 grid(static_cast<uint32_t>(blocks), static_cast<uint32_t>(std::min(job.batch, kMostBlocks)));
  std::optional<Tensor> room;
  if (parts > 1) room = torch::stable::new_empty(y, {rows * parts}, ScalarType::Double);
  double* sums = room ? static_cast<double*>(room->mutable_data_ptr()) : nullptr;
  by_type(launch, [&]<class T, int32_t kMost, int32_t kFamily>() {
    using S = Arithmetic<T>;
    const RateRule<S> rule(likelihood_bound, job.output);
    mixture_rate_rows_kernel<T, kMost, kFamily><<<grid, kThreads, 0, launch.stream>>>(
        job, rule, static_cast<uint32_t>(lanes), static_cast<uint32_t>(parts), sums);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (parts == 1) return;
    const int64_t sum_blocks = (rows + kThreads - 1) / kThreads;
    mixture_rate_parts_kernel<S><<<static_cast<uint32_t>(sum_blocks), kThreads, 0, launch.stream>>>(
        sums, rows, parts, static_cast<S*>(job.rate));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

void mixture_rate_out(Tensor y, Tensor scales, std::optional<Tensor> means, std::optional<Tensor> weights,
                      std::optional<Tensor> seed, std::vector<int64_t> families, int64_t quantize, double scale_bound,
                      double likelihood_bound, bool logits, int64_t output, Tensor y_hat, Tensor rate, Tensor slopes) {
  STD_TORCH_CHECK(slopes.numel() == 0, "mixture_rate: the gradients evaluate the density again, no slopes are made");
  const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  Alignment aligned{};
  Launch launch = make_launch(y, scales, means, weights, seed, families, quantize, scale_bound, likelihood_bound,
                              logits, output, aligned);
  Job& job = launch.job;
  job.y_hat = aligned.written(y_hat);
  const bool rows = output == kBitsPerChannel;
  if (rows) aligned.all = aligned.all && job.inner % 4 == 0;
  job.rate = rows ? rate.mutable_data_ptr() : aligned.written(rate);
  job.vector = aligned.all;
  if (rows) return rows_out(launch, y, likelihood_bound);
  by_type(launch, [&]<class T, int32_t kMost, int32_t kFamily>() {
    const RateRule<Arithmetic<T>> rule(likelihood_bound, job.output);
    mixture_rate_kernel<T, kMost, kFamily><<<grid_of(job), kThreads, 0, launch.stream>>>(job, rule);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void mixture_rate_bwd_out(std::optional<Tensor> grad_y_hat, std::optional<Tensor> grad_rate, Tensor, Tensor y,
                          Tensor scales, std::optional<Tensor> means, std::optional<Tensor> weights,
                          std::optional<Tensor> seed, std::vector<int64_t> families, int64_t quantize,
                          double scale_bound, double likelihood_bound, bool logits, int64_t output, Tensor grad_y,
                          Tensor grad_scales, Tensor grad_means, Tensor grad_weights) {
  const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  Alignment aligned{};
  Launch launch = make_launch(y, scales, means, weights, seed, families, quantize, scale_bound, likelihood_bound,
                              logits, output, aligned);
  Job& job = launch.job;
  const auto upstream = [&](const std::optional<Tensor>& grad, int64_t whole) {
    if (!grad) return Upstream{nullptr, false};
    STD_TORCH_CHECK(grad->numel() == 1 || grad->numel() == whole, "mixture_rate: the size of an upstream gradient");
    if (whole == y.numel() && grad->numel() == whole) return Upstream{aligned.read(*grad), false};
    return Upstream{grad->const_data_ptr(), grad->numel() == 1 && whole != 1};
  };
  if (quantize != kNotQuantized) job.grad_y_hat = upstream(grad_y_hat, y.numel());
  job.grad_rate = upstream(grad_rate, output == kBitsPerChannel ? job.batch * y.size(1) : y.numel());
  job.grad_y = aligned.written(grad_y);
  job.grad_scales = aligned.written(grad_scales);
  job.grad_means = aligned.written(grad_means);
  job.grad_weights = aligned.written(grad_weights);
  job.vector = aligned.all;
  by_type(launch, [&]<class T, int32_t kMost, int32_t kFamily>() {
    const RateRule<Arithmetic<T>> rule(likelihood_bound, job.output);
    mixture_rate_bwd_kernel<T, kMost, kFamily><<<grid_of(job), kThreads, 0, launch.stream>>>(job, rule);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cuda, m) {
  m.def(
      "mixture_rate_out(Tensor y, Tensor scales, Tensor? means, Tensor? weights, Tensor? seed, int[] families, "
      "int quantize, float scale_bound, float likelihood_bound, bool logits, int output, Tensor(a!) y_hat, "
      "Tensor(b!) rate, Tensor(c!) slopes) -> ()");
  m.def(
      "mixture_rate_bwd_out(Tensor? grad_y_hat, Tensor? grad_rate, Tensor slopes, Tensor y, Tensor scales, Tensor? "
      "means, "
      "Tensor? weights, Tensor? seed, int[] families, int quantize, float scale_bound, float likelihood_bound, "
      "bool logits, int output, Tensor(a!) grad_y, Tensor(b!) grad_scales, Tensor(c!) grad_means, "
      "Tensor(d!) grad_weights) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("mixture_rate_out", TORCH_BOX(&lic_fast::mixture_rate_out));
  m.impl("mixture_rate_bwd_out", TORCH_BOX(&lic_fast::mixture_rate_bwd_out));
}
