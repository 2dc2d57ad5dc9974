// stdet_adam_step_, stdet_reconstruct_ and stdet_mask_ on lists of CUDA tensors: what they take, and their launches.
// The kernels, with what they read and write, are in stdet.cuh.
#include "cuda/stdet.cuh"

#include <limits>

namespace lic_fast {
namespace {

int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }

bool readable(const Tensor& tensor) {
  const int32_t type = dtype_code(tensor);
  return type == kFloat32 || type == kBFloat16 || type == kFloat16;
}

struct Embedding {  // what stdet_adam_step_ and stdet_reconstruct_ have alike
  const Tensor &code, &base, &k, &d, &refs;
};

struct Moments {  // without tensors in stdet_reconstruct_
  const Tensor *exp_avg = nullptr, *exp_avg_sq = nullptr, *hyper = nullptr;
  double alpha = 1.0;
  bool reset = false;
};

bool flat(const Tensor& tensor, const Tensor& param, ScalarType type, int64_t dims) {
  return tensor.is_cuda() && tensor.get_device_index() == param.get_device_index() && tensor.scalar_type() == type &&
         tensor.dim() == dims && tensor.is_contiguous();
}

bool fits(const Embedding& e, const Tensor& p, int64_t blocks) {
  return flat(e.code, p, ScalarType::Byte, 1) && e.code.numel() == blocks * kBlock &&
         flat(e.base, p, ScalarType::Long, 2) && e.base.size(0) == blocks && e.base.size(1) == 2 &&
         flat(e.k, p, ScalarType::Float, 1) && flat(e.d, p, ScalarType::Float, 1) && e.k.numel() == e.d.numel() &&
         flat(e.refs, p, ScalarType::Long, 2) && e.refs.size(0) < kModes && e.refs.size(1) == 3 &&
         blocks <= std::numeric_limits<int32_t>::max();
}

bool fits(const Moments& m, const Tensor& p, size_t tensors) {
  const Tensor& h = *m.hyper;
  return flat(*m.exp_avg, p, ScalarType::Float, 1) && flat(*m.exp_avg_sq, p, ScalarType::Float, 1) &&
         m.exp_avg->numel() == m.exp_avg_sq->numel() && h.is_cpu() && h.scalar_type() == ScalarType::Double &&
         h.is_contiguous() && h.dim() == 2 && h.size(0) == static_cast<int64_t>(tensors) && h.size(1) == 7;
}

void set_hyper(Entry& e, const double* row) {
  const auto narrow = [](double value) { return static_cast<float>(value); };
  e.hyper = {narrow(row[0]), narrow(1.0 - row[1]), narrow(row[2]), narrow(1.0 - row[2]),
             narrow(row[3]), narrow(row[4]),       narrow(row[5]), narrow(row[6])};
  e.has_l2 = row[5] != 0.0;  // before rounding: as the specification asks
  e.has_decay = row[6] != 0.0;
}

using Tables = std::vector<ListTable<Entry>>;

template <class P>
void launch(const Tables& tables, const Embedding& e, const Moments& moments) {
  const auto floats = [](const Tensor* t) { return t ? static_cast<float*>(t->mutable_data_ptr()) : nullptr; };
  const cudaStream_t stream = current_stream(e.code);
  const Tensor scratch = torch::stable::new_empty(e.k, {2 * kModes});
  const uint8_t* code = static_cast<const uint8_t*>(e.code.const_data_ptr());
  float *m = floats(moments.exp_avg), *v = floats(moments.exp_avg_sq), *values = floats(&scratch);
  const Averaging how{static_cast<float>(moments.alpha), moments.alpha != 1.0, moments.reset};
  int32_t first = 0;
  for (const ListTable<Entry>& table : tables) {  // all references before any element changes
    stdet_references_kernel<P><<<1, kModes, 0, stream>>>(table, code, m, v, m ? moments.exp_avg->numel() : 0,
                                                         static_cast<const int64_t*>(e.refs.const_data_ptr()), values,
                                                         static_cast<int32_t>(e.refs.size(0)), first, how);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    first += table.count;
  }
  for (const ListTable<Entry>& table : tables) {
    if (table.blocks == 0) continue;
    stdet_step_kernel<P><<<table.blocks, kThreads, 0, stream>>>(table, code,
                                                                static_cast<const int64_t*>(e.base.const_data_ptr()),
                                                                floats(&e.k), floats(&e.d), m, v, values, how);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

// Returns false, having launched nothing, where the lists are not what the kernels can walk; so do the ops.
bool run(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& slow,
         const Embedding& embedding, const Moments& moments) {
  if (params.empty() || !params[0].is_cuda() || !readable(params[0])) return false;
  Tables tables(1);
  int64_t block = 0;
  for (size_t t = 0; t < params.size(); ++t) {
    const Tensor& p = params[t];
    if (p.scalar_type() != params[0].scalar_type()) return false;
    if (!p.is_cuda() || p.get_device_index() != params[0].get_device_index() || !is_dense(p)) return false;
    Entry e{p.mutable_data_ptr(), nullptr, nullptr, p.numel(), {}, static_cast<int32_t>(block), false, false};
    if (moments.hyper) set_hyper(e, static_cast<const double*>(moments.hyper->const_data_ptr()) + 7 * t);
    if (!grads.empty() && grads[t].numel() == e.n) {
      if (grads[t].scalar_type() != p.scalar_type() || !alike(p, grads[t])) return false;
      e.grad = grads[t].const_data_ptr();
    }
    if (!slow.empty()) {
      if (slow[t].scalar_type() != ScalarType::Float || !alike(p, slow[t])) return false;
      e.slow = static_cast<float*>(slow[t].mutable_data_ptr());
    }
    if (tables.back().full()) tables.emplace_back();
    tables.back().add(e, static_cast<int32_t>(blocks_of(e.n)));  // an empty tensor too: references count tensors
    block += blocks_of(e.n);
  }
  if (!fits(embedding, params[0], block)) return false;
  Memory memory({&embedding.code, &embedding.base, &embedding.k, &embedding.d, &embedding.refs}, {});
  if (moments.exp_avg) memory.add(*moments.exp_avg, true).add(*moments.exp_avg_sq, true);
  if (!memory.reads(grads).writes(params).writes(slow).disjoint()) return false;
  const torch::stable::accelerator::DeviceGuard guard(params[0].get_device_index());
  switch (dtype_code(params[0])) {
    case kFloat32: launch<float>(tables, embedding, moments); break;
    case kBFloat16: launch<__nv_bfloat16>(tables, embedding, moments); break;
    default: launch<__half>(tables, embedding, moments); break;
  }
  return true;
}

bool stdet_adam_step_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> slow, Tensor code,
                      Tensor base, Tensor k, Tensor d, Tensor exp_avg, Tensor exp_avg_sq, Tensor refs, Tensor hyper,
                      double alpha, bool reset) {
  const size_t n = params.size();
  if (n == 0 || grads.size() != n || (!slow.empty() && slow.size() != n)) return false;
  const Moments moments{&exp_avg, &exp_avg_sq, &hyper, alpha, reset};
  return fits(moments, params[0], n) && run(params, grads, slow, {code, base, k, d, refs}, moments);
}

bool stdet_reconstruct_(std::vector<Tensor> params, Tensor code, Tensor base, Tensor k, Tensor d, Tensor refs) {
  return run(params, {}, {}, {code, base, k, d, refs}, {});
}

void launch(const ListTable<Gradient>& table, const Tensor& code, int64_t size) {
  if (table.blocks == 0) return;
  const uint8_t* bytes = static_cast<const uint8_t*>(code.const_data_ptr());
  const auto kernel = size == 4 ? stdet_mask_kernel<uint32_t> : stdet_mask_kernel<uint16_t>;
  kernel<<<table.blocks, kThreads, 0, current_stream(code)>>>(table, bytes);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

bool stdet_mask_(std::vector<Tensor> grads, Tensor code, std::vector<int64_t> sizes) {
  if (grads.empty() || grads.size() != sizes.size()) return false;
  int64_t blocks = 0;
  for (size_t t = 0; t < grads.size(); ++t) {
    const Tensor& g = grads[t];
    if (!readable(g) || g.scalar_type() != grads[0].scalar_type() || !g.is_cuda() || !is_dense(g)) return false;
    if (g.get_device_index() != code.get_device_index() || sizes[t] < 0) return false;
    blocks += blocks_of(sizes[t]);
  }
  if (!flat(code, grads[0], ScalarType::Byte, 1) || code.numel() != blocks * kBlock) return false;
  const torch::stable::accelerator::DeviceGuard guard(code.get_device_index());
  const int64_t size = grads[0].element_size();
  ListTable<Gradient> table;
  int64_t block = 0;
  for (size_t t = 0; t < grads.size(); block += blocks_of(sizes[t++])) {
    if (sizes[t] == 0 || grads[t].numel() != sizes[t]) continue;
    if (table.full()) {
      launch(table, code, size);
      table.count = table.blocks = 0;
    }
    table.add({grads[t].mutable_data_ptr(), sizes[t], block}, static_cast<int32_t>(blocks_of(sizes[t])));
  }
  launch(table, code, size);
  return true;
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cuda, m) {
  m.def(
      "stdet_adam_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] slow, Tensor code, Tensor base, Tensor k, "
      "Tensor d, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor refs, Tensor hyper, float alpha, bool reset)"
      " -> bool");
  m.def("stdet_reconstruct_(Tensor(a!)[] params, Tensor code, Tensor base, Tensor k, Tensor d, Tensor refs) -> bool");
  m.def("stdet_mask_(Tensor(a!)[] grads, Tensor code, int[] sizes) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("stdet_adam_step_", TORCH_BOX(&lic_fast::stdet_adam_step_));
  m.impl("stdet_reconstruct_", TORCH_BOX(&lic_fast::stdet_reconstruct_));
  m.impl("stdet_mask_", TORCH_BOX(&lic_fast::stdet_mask_));
}
