// What every kernel's host side needs of a tensor: its dtype as a small code, its pointer, its place in a list.
//
// Shapes, dtypes and devices are validated in Python, where the messages are written; the checks here only
// keep a direct call of the native op from touching memory it must not.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace lic_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Codes stored in the tables that kernels read; 8 bits each.
enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat64 = 2, kFloat16 = 3, kUInt8 = 4, kInt16 = 5, kInt32 = 6 };

inline int32_t dtype_code(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Double: return kFloat64;
    case ScalarType::Half: return kFloat16;
    case ScalarType::Byte: return kUInt8;
    case ScalarType::Short: return kInt16;
    case ScalarType::Int: return kInt32;
    default: STD_TORCH_CHECK(false, "lic_fast: a dtype that no native kernel reads");
  }
  return -1;
}

inline void check_same_numel(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.numel() == b.numel(), "lic_fast: sizes differ, got ", a.numel(), " and ", b.numel());
}

inline void check_same_length(size_t a, size_t b) {
  STD_TORCH_CHECK(a == b, "lic_fast: list lengths differ, got ", a, " and ", b);
}

}  // namespace lic_fast
