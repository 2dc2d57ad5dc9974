// Tensors that hold what the coder reads: packed tables, arrays on the CPU.
#pragma once

#include "common/rans_mixture.h"
#include "common/tensors.h"

namespace lic_fast {

template <class TableSet>
TableSet opened(const Tensor& packed) {
  TableSet tables;
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Long && packed.is_contiguous() && packed.is_cpu() &&
                      rans::open(static_cast<const int64_t*>(packed.const_data_ptr()), packed.numel(), &tables),
                  "rans_coder: tables that are not what pack() made");
  return tables;
}

template <class T>
const T* data_of(const Tensor& tensor, ScalarType type) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.is_contiguous() && tensor.is_cpu(),
                  "rans_coder: a contiguous tensor of another dtype, or on the CPU, is needed");
  return static_cast<const T*>(tensor.const_data_ptr());
}

// Whether tables are those of mixtures: they have no rows.
inline bool of_mixtures(const Tensor& packed) {
  return packed.numel() == rans::kMixtureWords && data_of<int64_t>(packed, ScalarType::Long)[1] == 0;
}

}  // namespace lic_fast
