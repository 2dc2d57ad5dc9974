// What affine_reconstruct has alike on either device: its native ops, and what it asks of lists.
#pragma once

#include <limits>

#include "common/tensors.h"

namespace lic_fast {

// Whether a kernel can walk the lists as they are: lengths, shapes, dtypes, devices and layouts. `types_code` gives the
// code of the dtypes of (w, k), or -1 where no kernel reads them; `tied` is empty where every element is tied.
template <class TypesCode>
bool walkable(const std::vector<Tensor>& w, const std::vector<Tensor>& k, const std::vector<Tensor>& d,
              const std::vector<Tensor>& mode, const Tensor& refs, const std::vector<Tensor>& tied, bool on_cuda,
              const TypesCode& types_code) {
  const size_t n = w.size();
  if (n == 0 || k.size() != n || d.size() != n || mode.size() != n || (!tied.empty() && tied.size() != n)) return false;
  const auto here = [&](const Tensor& t) {
    return (on_cuda ? t.is_cuda() : t.is_cpu()) && t.get_device_index() == w[0].get_device_index();
  };
  if (!here(refs) || refs.dim() != 1 || !refs.is_contiguous()) return false;
  if (refs.numel() > std::numeric_limits<int32_t>::max()) return false;
  const int32_t refs_type = dtype_code(refs);
  for (size_t t = 0; t < n; ++t) {
    if (!here(w[t]) || types_code(w[t], k[t]) < 0) return false;
    if (dtype_code(k[t]) != refs_type || dtype_code(d[t]) != refs_type) return false;
    const int32_t mode_type = dtype_code(mode[t]);
    if (mode_type != kUInt8 && mode_type != kInt16 && mode_type != kInt32) return false;
    if (!alike(w[t], k[t]) || !alike(w[t], d[t]) || !alike(w[t], mode[t])) return false;
    if (overlap(w[t], k[t]) || overlap(w[t], d[t]) || overlap(w[t], mode[t])) return false;
    if (!tied.empty() && (tied[t].scalar_type() != ScalarType::Bool || !alike(w[t], tied[t]))) return false;
  }
  return true;
}

// The three native ops, alike on either device.
inline void define_affine_reconstruct(torch::stable::detail::StableLibrary& m) {
  m.def(
      "affine_reconstruct_out(Tensor w, Tensor k, Tensor d, Tensor mode, Tensor refs, Tensor? tied, Tensor(a!) out)"
      " -> bool");
  m.def(
      "affine_reconstruct_(Tensor(a!)[] w, Tensor[] k, Tensor[] d, Tensor[] mode, Tensor refs, Tensor[] tied) -> int");
  m.def(
      "affine_reconstruct_bwd_out(Tensor grad, Tensor k, Tensor mode, Tensor refs, Tensor? tied, Tensor(a!) grad_w,"
      " Tensor(b!) grad_k, Tensor(c!) grad_d, Tensor(d!) grad_refs) -> ()");
}

}  // namespace lic_fast
