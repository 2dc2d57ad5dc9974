// The integers of mixtures over tensors: reads 12 bytes a component and writes 8, and 8 an element, once each; what
// bounds it is the arithmetic, two divisions a component and one an element (cpu/rans_mixture_parameters.h).
#include "cpu/rans_mixture_parameters.h"

#include "cpu/parallel.h"
#include "cpu/rans_stream.h"
#include "cpu/rans_tensors.h"

namespace lic_fast {
namespace {

// int32 [B, 2 + 2 K, N], from fp32 scales, means and weights [B, K, N].
Tensor rans_coder_mixture(Tensor scales, Tensor means, Tensor weights, Tensor packed, int64_t variant) {
  check_same_numel(scales, means);
  check_same_numel(scales, weights);
  STD_TORCH_CHECK(
      of_mixtures(packed) && scales.dim() == 3 && scales.size(1) >= 1 && scales.size(1) <= rans::kMostComponents,
      "rans_coder: 1 to 16 components and tables of mixtures are needed");
  const auto tables = opened<rans::MixtureTables>(packed);
  const int64_t batch = scales.size(0), components = scales.size(1), n = scales.size(2), planes = 2 + 2 * components;
  Tensor words = torch::stable::new_empty(scales, {batch, planes, n}, ScalarType::Int);
  float reach[17];
  for (int32_t i = 0; i < 17; ++i) reach[i] = static_cast<float>(tables.reach[i]) * 0.0625f;
  rans::MixtureInputs in{data_of<float>(scales, ScalarType::Float),
                         data_of<float>(means, ScalarType::Float),
                         data_of<float>(weights, ScalarType::Float),
                         n,
                         static_cast<int32_t>(components),
                         static_cast<float>(tables.steps),
                         reach,
                         static_cast<int32_t*>(words.mutable_data_ptr())};
  for (int64_t b = 0; b < batch; ++b) {
    torch::stable::parallel_for(0, n, kSerialElements, [&](int64_t begin, int64_t end) {
      if (variant != rans::kLockstep) return rans::mixture_tiles(&in, begin, end);
      for (int64_t i = begin; i < end; ++i) rans::mixture_words(in, i);  // as threads of a GPU do it
    });
    in.scales += components * n, in.means += components * n, in.weights += components * n, in.words += planes * n;
  }
  return words;
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cpp, m) {
  m.def("rans_coder_mixture(Tensor scales, Tensor means, Tensor weights, Tensor packed, int variant) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("rans_coder_mixture", TORCH_BOX(&lic_fast::rans_coder_mixture));
}
