// Whether this library's kernels can run on the current device with this driver: 0, or the CUDA error that says why
// not.
#include "cuda/device.cuh"

namespace lic_fast {
namespace {

__global__ void probe_kernel() {}

int64_t probe() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  (void)cudaGetLastError();  // it is reported here, not by a later call
  return static_cast<int64_t>(error);
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cuda, m) { m.def("probe() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cuda, CompositeExplicitAutograd, m) { m.impl("probe", TORCH_BOX(&lic_fast::probe)); }
