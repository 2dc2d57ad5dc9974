// What every kernel's host side needs of a tensor: its dtype as a small code, its pointer, its place in a list.
//
// Shapes, dtypes and devices are validated in Python, where the messages are written. The kernels over lists look at
// them too, far cheaper than Python can over hundreds of tensors: they take a list whole, or return without having
// written anything, and Python then finds what is wrong, or takes the long way round.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <utility>
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
    default: return -1;  // read by no native kernel
  }
}

// Whether two dense tensors share a byte.
inline bool overlap(const Tensor& a, const Tensor& b) {
  const uintptr_t a_first = reinterpret_cast<uintptr_t>(a.const_data_ptr());
  const uintptr_t b_first = reinterpret_cast<uintptr_t>(b.const_data_ptr());
  return a_first < b_first + b.numel() * b.element_size() && b_first < a_first + a.numel() * a.element_size();
}

// The memory of dense tensors that are read and written, sorted once: far cheaper than comparing each with each.
class Memory {
 public:
  Memory(std::initializer_list<const Tensor*> read, std::initializer_list<const Tensor*> written) {
    for (const Tensor* tensor : read) add(*tensor, false);
    for (const Tensor* tensor : written) add(*tensor, true);
  }

  Memory& add(const Tensor& tensor, bool written) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    if (tensor.numel()) spans_.push_back({first, first + tensor.numel() * tensor.element_size(), written});
    return *this;
  }
  Memory& reads(const std::vector<Tensor>& tensors) {
    for (const Tensor& tensor : tensors) add(tensor, false);
    return *this;
  }
  Memory& writes(const std::vector<Tensor>& tensors) {
    for (const Tensor& tensor : tensors) add(tensor, true);
    return *this;
  }

  // Whether none that is written shares a byte with another.
  bool disjoint() {
    std::sort(spans_.begin(), spans_.end(), [](const Span& a, const Span& b) { return a.first < b.first; });
    uintptr_t any_end = 0, written_end = 0;
    for (const Span& span : spans_) {
      if (span.first < (span.written ? any_end : written_end)) return false;
      any_end = std::max(any_end, span.end);
      if (span.written) written_end = std::max(written_end, span.end);
    }
    return true;
  }

 private:
  struct Span {
    uintptr_t first, end;
    bool written;
  };
  std::vector<Span> spans_;
};

inline void check_same_numel(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.numel() == b.numel(), "lic_fast: sizes differ, got ", a.numel(), " and ", b.numel());
}

// Whether the elements fill one stretch of memory, each place once, in any order of the dimensions.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> steps;  // stride, size
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) != 1) steps.emplace_back(tensor.stride(i), tensor.size(i));
  }
  std::sort(steps.begin(), steps.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : steps) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Whether two tensors lie dense on one device, with one shape and one order in memory: a flat loop pairs their
// elements.
inline bool alike(const Tensor& a, const Tensor& b) {
  int32_t types[2];
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(a.get(), &types[0]));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(b.get(), &types[1]));
  if (types[0] != types[1] || a.get_device_index() != b.get_device_index() || a.dim() != b.dim()) return false;
  if (!std::equal(a.sizes().begin(), a.sizes().end(), b.sizes().begin())) return false;
  if (a.is_contiguous() && b.is_contiguous()) return true;
  return std::equal(a.strides().begin(), a.strides().end(), b.strides().begin()) && is_dense(a);
}

}  // namespace lic_fast
