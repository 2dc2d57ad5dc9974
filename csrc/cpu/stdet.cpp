// The step of a partly embedded model, on the CPU; the reference is lic_fast/reference/stdet.py, which says what each
// element gets; cpu/embedded.h says how compact tensors are walked.
//
// One parallel region over all blocks of all tensors. Every byte is read and written once: in fp32 13 bytes an element
// (p, code, gradient), 16 for each that has moments, 8 for each that has k and d, 8 where the step averages. A block
// leaves alone what it does not need: no k and d without a tied element, no moments and gradient without a free one.
// Tied elements need the new values of at most 63 references: a first, serial pass computes them with the same formula.
//
// Trusted: nothing that would lead outside the tensors. A block whose marks do not count up to its row of `base` is
// skipped, and the op raises at its end; references outside the tensors are refused before anything is written.
#include <limits>

#include "cpu/stdet_loops.h"

namespace lic_fast {
namespace {

enum Types : int32_t { kF32F32, kBF16F32, kF64F64 };  // dtypes of (parameters, k)

// Blocks [begin, end) of all, which lie in `part`, whose first one is first_block.
template <class Isa>
LIC_FAST_INLINE void run_blocks_body(const Part& part, const Flat& f, int32_t types, int64_t first_block, int64_t begin,
                                     int64_t end) {
  switch (types) {
    case kF32F32: return blocks_of<Isa, float, float>(part, f, first_block, begin, end);
    case kBF16F32: return blocks_of<Isa, BFloat16, float>(part, f, first_block, begin, end);
    default: return blocks_of<Isa, double, double>(part, f, first_block, begin, end);
  }
}

LIC_FAST_SIMD_VARIANTS(run_blocks,
                       (const Part& part, const Flat& f, int32_t types, int64_t first_block, int64_t begin,
                        int64_t end),
                       (part, f, types, first_block, begin, end));

template <class Bits>
LIC_FAST_INLINE void mask_of(void* data, const uint8_t* __restrict__ code, int64_t n) {
  Bits* __restrict__ x = static_cast<Bits*>(data);
  for (int64_t i = 0; i < n; ++i) x[i] = select((code[i] & kTied) != 0, Bits(0), x[i]);
}

template <class Isa>
LIC_FAST_INLINE void mask_blocks_body(void* data, const uint8_t* code, int64_t n, int64_t size) {
  for (int64_t i = 0; i < n; i += kBlock) {
    uint64_t all = 0;
    for (int64_t w = 0; w < kBlock; w += 8) {
      uint64_t bytes;
      std::memcpy(&bytes, code + i + w, sizeof bytes);
      all |= bytes;
    }
    if (!(all & 0x8080808080808080u)) continue;  // nothing tied here: the gradient is not even read
    const int64_t here = std::min(kBlock, n - i);
    void* x = advance(data, i, size);
    size == 2   ? mask_of<uint16_t>(x, code + i, here)
    : size == 4 ? mask_of<uint32_t>(x, code + i, here)
                : mask_of<uint64_t>(x, code + i, here);
  }
}

LIC_FAST_SIMD_VARIANTS(mask_blocks, (void* data, const uint8_t* code, int64_t n, int64_t size), (data, code, n, size));

struct List {
  std::vector<Part> parts;
  std::vector<int64_t> first_block{0};  // of each part, and the number of all blocks
  int32_t types = 0;

  void add(const Part& part, int64_t n) {
    parts.push_back(part);
    first_block.push_back(first_block.back() + (n + kBlock - 1) / kBlock);
  }

  // body(part, its first block, begin, end) for stretches of blocks, shared evenly among threads.
  template <class Body>
  void parallel(const Body& body) const {
    torch::stable::parallel_for(0, first_block.back(), kSerialElements / kBlock, [&](int64_t begin, int64_t end) {
      size_t t = std::upper_bound(first_block.begin(), first_block.end(), begin) - first_block.begin() - 1;
      for (; begin < end; ++t) {
        const int64_t stop = std::min(end, first_block[t + 1]);
        if (stop > begin) body(parts[t], first_block[t], begin, stop);
        begin = stop;
      }
    });
  }
};

bool is_flat(const Tensor& tensor, ScalarType type, int64_t dims) {
  return tensor.is_cpu() && tensor.scalar_type() == type && tensor.dim() == dims && tensor.is_contiguous();
}

// The list of parameters and what they share, or false where the kernel cannot walk them.
bool collect(const std::vector<Tensor>& params, const Tensor& code, const Tensor& base, const Tensor& k,
             const Tensor& d, const Tensor& refs, List& list, Flat& f) {
  if (params.empty()) return false;
  const int32_t p = dtype_code(params[0]);
  list.types = p == kFloat32 ? kF32F32 : p == kBFloat16 ? kBF16F32 : p == kFloat64 ? kF64F64 : -1;
  if (list.types < 0) return false;
  const ScalarType wide = list.types == kF64F64 ? ScalarType::Double : ScalarType::Float;
  for (const Tensor& tensor : params) {
    if (!tensor.is_cpu() || dtype_code(tensor) != p || !is_dense(tensor)) return false;
    list.add({tensor.mutable_data_ptr(), nullptr, nullptr, tensor.numel(), {}}, tensor.numel());
  }
  const int64_t blocks = list.first_block.back();
  if (!is_flat(code, ScalarType::Byte, 1) || code.numel() != blocks * kBlock) return false;
  if (!is_flat(base, ScalarType::Long, 2) || base.size(0) != blocks || base.size(1) != 2) return false;
  if (!is_flat(k, wide, 1) || !is_flat(d, wide, 1) || k.numel() != d.numel()) return false;
  if (!is_flat(refs, ScalarType::Long, 2) || refs.size(1) != 3 || refs.size(0) >= kModes) return false;
  f = {};
  f.code = static_cast<const uint8_t*>(code.const_data_ptr());
  f.base = static_cast<const int64_t*>(base.const_data_ptr());
  f.k = k.const_data_ptr();
  f.d = d.const_data_ptr();
  f.coefficients = k.numel();
  return true;
}

// The gradients, averages and moments of a step, and its hyperparameters; false where the kernel cannot walk them.
bool collect_step(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& slow,
                  const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& hyper, List& list, Flat& f) {
  const size_t n = params.size();
  const ScalarType wide = list.types == kF64F64 ? ScalarType::Double : ScalarType::Float;
  if (grads.size() != n || (!slow.empty() && slow.size() != n)) return false;
  if (!is_flat(exp_avg, wide, 1) || !is_flat(exp_avg_sq, wide, 1) || exp_avg.numel() != exp_avg_sq.numel()) {
    return false;
  }
  if (!is_flat(hyper, ScalarType::Double, 2) || hyper.size(0) != static_cast<int64_t>(n) || hyper.size(1) != 7) {
    return false;
  }
  for (size_t t = 0; t < n; ++t) {
    Part& part = list.parts[t];
    part.hyper = static_cast<const StepHyper*>(hyper.const_data_ptr())[t];
    if (grads[t].numel() != 0) {
      if (grads[t].scalar_type() != params[t].scalar_type() || !alike(params[t], grads[t])) return false;
      part.g = grads[t].const_data_ptr();
    }
    if (!slow.empty()) {
      if (slow[t].scalar_type() != wide || !alike(params[t], slow[t])) return false;
      part.slow = slow[t].mutable_data_ptr();
    }
  }
  f.m = exp_avg.mutable_data_ptr();
  f.v = exp_avg_sq.mutable_data_ptr();
  f.states = exp_avg.numel();
  return true;
}

// What the references are after the step, in p's dtype and in slow, by the formulas of the loops. Nothing is written.
template <class P, class T>
bool find_references(const List& list, const Flat& f, const Tensor& refs, T* values, T* slow_values) {
  std::fill(values, values + kModes, std::numeric_limits<T>::quiet_NaN());
  std::fill(slow_values, slow_values + kModes, std::numeric_limits<T>::quiet_NaN());
  const int64_t* row = static_cast<const int64_t*>(refs.const_data_ptr());
  const int64_t parts = static_cast<int64_t>(list.parts.size());
  for (int64_t mode = 0; mode < refs.size(0); ++mode, row += 3) {
    if (row[0] < 0 || row[0] >= parts) return false;
    const Part& part = list.parts[row[0]];
    if (row[1] < 0 || row[1] >= part.n) return false;
    const uint8_t code = f.code[list.first_block[row[0]] * kBlock + row[1]];
    P p = static_cast<const P*>(part.p)[row[1]];
    if (part.g && !(code & (kTied | kStateless))) {
      if (row[2] < 0 || row[2] >= f.states) return false;
      const T g = convert<T>(static_cast<const P*>(part.g)[row[1]]);
      const T m = static_cast<const T*>(f.m)[row[2]], v = static_cast<const T*>(f.v)[row[2]];
      p = convert<P>(adam(convert<T>(p), g, m, v, Coefficients<T>(part.hyper)).p);
    }
    values[mode] = convert<T>(p);
    if (!part.slow) continue;
    const T slow = static_cast<const T*>(part.slow)[row[1]];
    slow_values[mode] = code & kTied ? slow : average(slow, values[mode], f.alpha);
  }
  return true;
}

bool find_references(const List& list, const Flat& f, const Tensor& refs, double* values, double* slow_values) {
  float *narrow = reinterpret_cast<float*>(values), *narrow_slow = reinterpret_cast<float*>(slow_values);
  switch (list.types) {
    case kF32F32: return find_references<float>(list, f, refs, narrow, narrow_slow);
    case kBF16F32: return find_references<BFloat16>(list, f, refs, narrow, narrow_slow);
    default: return find_references<double>(list, f, refs, values, slow_values);
  }
}

bool run(const char* name, const List& list, Flat& f, const Tensor& refs) {
  alignas(64) double values[kModes], slow_values[kModes];  // hold floats where k does
  std::atomic<bool> wrong{false};
  if (!find_references(list, f, refs, values, slow_values)) return false;
  f.values = values;
  f.slow_values = slow_values;
  f.wrong = &wrong;
  list.parallel([&](const Part& part, int64_t first_block, int64_t begin, int64_t end) {
    run_blocks(part, f, list.types, first_block, begin, end);
  });
  STD_TORCH_CHECK(!wrong, name, ": base does not count what code holds; make it anew with FlatLayout.base_of(code)");
  return true;
}

// All three return false, having written nothing, where the lists are not what the reference says.
bool stdet_adam_step_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> slow, Tensor code,
                      Tensor base, Tensor k, Tensor d, Tensor exp_avg, Tensor exp_avg_sq, Tensor refs, Tensor hyper,
                      double alpha, bool reset) {
  List list;
  Flat f;
  if (!collect(params, code, base, k, d, refs, list, f)) return false;
  if (!collect_step(params, grads, slow, exp_avg, exp_avg_sq, hyper, list, f)) return false;
  Memory memory({&code, &base, &k, &d, &refs, &hyper}, {&exp_avg, &exp_avg_sq});
  if (!memory.reads(grads).writes(params).writes(slow).disjoint()) return false;
  f.alpha = alpha;
  f.reset = reset;
  return run("stdet_adam_step_", list, f, refs);
}

bool stdet_reconstruct_(std::vector<Tensor> params, Tensor code, Tensor base, Tensor k, Tensor d, Tensor refs) {
  List list;
  Flat f;
  if (!collect(params, code, base, k, d, refs, list, f)) return false;
  return Memory({&code, &base, &k, &d, &refs}, {}).writes(params).disjoint() &&
         run("stdet_reconstruct_", list, f, refs);
}

bool stdet_mask_(std::vector<Tensor> grads, Tensor code, std::vector<int64_t> sizes) {
  if (grads.empty() || grads.size() != sizes.size()) return false;
  List list;
  const int64_t size = grads[0].element_size();
  for (size_t t = 0; t < grads.size(); ++t) {
    const int64_t n = grads[t].numel();
    if (!grads[t].is_cpu() || grads[t].scalar_type() != grads[0].scalar_type() || !is_dense(grads[t])) return false;
    if (sizes[t] < 0 || (n != 0 && n != sizes[t])) return false;
    list.add({n ? grads[t].mutable_data_ptr() : nullptr, nullptr, nullptr, n, {}}, sizes[t]);
  }
  if (size != 2 && size != 4 && size != 8) return false;
  if (!is_flat(code, ScalarType::Byte, 1) || code.numel() != list.first_block.back() * kBlock) return false;
  const uint8_t* bytes = static_cast<const uint8_t*>(code.const_data_ptr());
  list.parallel([&](const Part& part, int64_t first_block, int64_t begin, int64_t end) {
    if (!part.p) return;
    const int64_t first = (begin - first_block) * kBlock, last = std::min(part.n, (end - first_block) * kBlock);
    mask_blocks(advance(part.p, first, size), bytes + begin * kBlock, last - first, size);
  });
  return true;
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cpp, m) {
  m.def(
      "stdet_adam_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] slow, Tensor code, Tensor base, Tensor k, "
      "Tensor d, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor refs, Tensor hyper, float alpha, bool reset) "
      "-> bool");
  m.def("stdet_reconstruct_(Tensor(a!)[] params, Tensor code, Tensor base, Tensor k, Tensor d, Tensor refs) -> bool");
  m.def("stdet_mask_(Tensor(a!)[] grads, Tensor code, int[] sizes) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("stdet_adam_step_", TORCH_BOX(&lic_fast::stdet_adam_step_));
  m.impl("stdet_reconstruct_", TORCH_BOX(&lic_fast::stdet_reconstruct_));
  m.impl("stdet_mask_", TORCH_BOX(&lic_fast::stdet_mask_));
}
