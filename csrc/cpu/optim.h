// What the optimizer kernels share: the tables of hyperparameters and counts, and a queue of tensors over threads.
#pragma once

#include <atomic>
#include <cmath>
#include <numeric>

#include "common/tensors.h"
#include "cpu/gemm.h"

namespace lic_fast {

struct Hyper {  // a row of the table hyper [n, 6]
  double lr, beta1, beta2, shampoo_beta, eps, weight_decay;
};

inline double step_size(const Hyper& h, int64_t step, bool correct_bias) {
  if (!correct_bias) return h.lr;
  const double n = static_cast<double>(step);
  return h.lr * (std::sqrt(1.0 - std::pow(h.beta2, n)) / (1.0 - std::pow(h.beta1, n)));
}

inline bool is_table(const Tensor& table, ScalarType type, size_t rows, int64_t columns) {
  return table.is_cpu() && table.scalar_type() == type && table.dim() == 2 && table.is_contiguous() &&
         table.size(0) == static_cast<int64_t>(rows) && table.size(1) == columns;
}

inline bool are_tables(const Tensor& counts, const Tensor& hyper, size_t n) {
  return is_table(counts, ScalarType::Long, n, 2) && is_table(hyper, ScalarType::Double, n, 6);
}

inline Hyper hyper_row(const Tensor& hyper, size_t i) { return static_cast<const Hyper*>(hyper.const_data_ptr())[i]; }

// Dtypes that meet in one tensor: states in fp32 serve parameters and gradients in fp32, bf16 and fp64, states in fp64
// those in fp64. Arithmetic is in the dtype of the states.
inline bool dtypes_fit(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq) {
  const int32_t p = dtype_code(param), g = dtype_code(grad), m = dtype_code(exp_avg);
  if (m != dtype_code(exp_avg_sq)) return false;
  if (m == kFloat64) return p == kFloat64 && g == kFloat64;
  const auto read = [](int32_t code) { return code == kFloat32 || code == kBFloat16 || code == kFloat64; };
  return m == kFloat32 && read(p) && read(g);
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  return a.dim() == b.dim() && std::equal(a.sizes().begin(), a.sizes().end(), b.sizes().begin());
}

// The exponent and leading digits of a number, for a test that vectorises: not finite where kNotFinite or more.
template <class From>
struct Magnitude {
  static constexpr uint32_t kNotFinite = 0x7F800000u;
  static LIC_FAST_INLINE uint32_t of(From value) {
    const float wide = convert<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &wide, sizeof bits);
    return bits & 0x7FFFFFFFu;
  }
};

template <>
struct Magnitude<double> {
  static constexpr uint32_t kNotFinite = 0x7FF00000u;
  static LIC_FAST_INLINE uint32_t of(double value) {
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint32_t>(bits >> 32) & 0x7FFFFFFFu;
  }
};

// Calls body(i, workspace) once for each i < costs.size(), the costliest first, each by the next thread that is free:
// one thread works on one tensor, whose result cannot depend on how many there are.
template <class Body>
void parallel_queue(const std::vector<double>& costs, const Body& body) {
  std::vector<size_t> queue(costs.size());
  std::iota(queue.begin(), queue.end(), size_t(0));
  std::stable_sort(queue.begin(), queue.end(), [&](size_t a, size_t b) { return costs[a] > costs[b]; });
  std::atomic<size_t> next{0};
  const double total = std::accumulate(costs.begin(), costs.end(), 0.0);
  const int64_t threads = total < 1e6 ? 1 : torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    static thread_local Workspace workspace;
    for (size_t i = next++; i < queue.size(); i = next++) body(queue[i], workspace);
  });
}

}  // namespace lic_fast
