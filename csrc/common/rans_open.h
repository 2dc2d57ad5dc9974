// Containers opened on the host, for the libraries of every device.
#pragma once

#include "common/rans_container.h"
#include "common/tensors.h"

namespace lic_fast::rans {

// The state of a container uint8 [bytes] on the CPU, int64 [32 + 24 W]: ContainerState, then W of StreamState.
inline Tensor open_tensor(const Tensor& stream, bool check) {
  STD_TORCH_CHECK(stream.scalar_type() == ScalarType::Byte && stream.is_contiguous() && stream.is_cpu(),
                  "rans_coder: a container is contiguous bytes on the CPU");
  Opened opened;
  opened.head.status = open(static_cast<const uint8_t*>(stream.const_data_ptr()), stream.numel(), check, &opened);
  const int64_t streams = opened.head.status == kDone ? opened.head.streams : 0;
  Tensor state = torch::stable::new_empty(stream, {32 + 24 * streams}, ScalarType::Long);
  uint8_t* out = static_cast<uint8_t*>(state.mutable_data_ptr());
  std::memcpy(out, &opened.head, sizeof(ContainerState));
  if (streams) std::memcpy(out + sizeof(ContainerState), opened.streams.data(), streams * sizeof(StreamState));
  return state;
}

}  // namespace lic_fast::rans
