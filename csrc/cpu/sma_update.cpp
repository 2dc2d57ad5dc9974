// Sampling-then-moving average over a list of tensors, one pass:
//     slow <- slow + alpha * (fast - slow);  fast <- slow where reset
// Reads slow and fast once, writes slow once and fast once where reset: 16 bytes an element in fp32.
// The whole list is one parallel region over its elements, so that threads share the bytes evenly whatever the
// shapes. Takes slow fp32 with fast fp32, bf16 or fp64, and slow fp64 with fast fp64; tensors must be dense, and
// the two of a pair laid out alike. Arithmetic is in fp32, or in fp64 where fast is fp64.
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace lic_fast {
namespace {

struct Piece {  // of one pair of tensors
  void* slow;
  void* fast;
  int64_t n;
  int32_t code;  // which pair of dtypes
  int32_t slow_size;
  int32_t fast_size;
};

enum Pair : int32_t { kF32F32, kF32BF16, kF32F64, kF64F64 };

template <class Slow, class Fast, class Acc>
LIC_FAST_INLINE void average(void* slow_ptr, void* fast_ptr, int64_t n, double alpha_in, bool reset) {
  Slow* __restrict__ slow = static_cast<Slow*>(slow_ptr);
  Fast* __restrict__ fast = static_cast<Fast*>(fast_ptr);
  const Acc alpha = static_cast<Acc>(alpha_in);
  if (reset) {
    for (int64_t i = 0; i < n; ++i) {
      const Acc old = convert<Acc>(slow[i]);
      const Slow value = convert<Slow>(old + alpha * (convert<Acc>(fast[i]) - old));
      slow[i] = value;
      fast[i] = convert<Fast>(value);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const Acc old = convert<Acc>(slow[i]);
      slow[i] = convert<Slow>(old + alpha * (convert<Acc>(fast[i]) - old));
    }
  }
}

template <class Isa>
LIC_FAST_INLINE void run_piece_body(const Piece& c, double alpha, bool reset) {
  switch (c.code) {
    case kF32F32: return average<float, float, float>(c.slow, c.fast, c.n, alpha, reset);
    case kF32BF16: return average<float, BFloat16, float>(c.slow, c.fast, c.n, alpha, reset);
    case kF32F64: return average<float, double, double>(c.slow, c.fast, c.n, alpha, reset);
    default: return average<double, double, double>(c.slow, c.fast, c.n, alpha, reset);
  }
}

LIC_FAST_SIMD_VARIANTS(run_piece, (const Piece& c, double alpha, bool reset), (c, alpha, reset));

int32_t pair_code(const Tensor& slow, const Tensor& fast) {  // -1 where no loop reads the pair
  const int32_t s = dtype_code(slow), f = dtype_code(fast);
  if (s == kFloat32 && f == kFloat32) return kF32F32;
  if (s == kFloat32 && f == kBFloat16) return kF32BF16;
  if (s == kFloat32 && f == kFloat64) return kF32F64;
  return s == kFloat64 && f == kFloat64 ? kF64F64 : -1;
}

// Returns false, having written nothing, where the lists are not pairs that the loops can walk.
bool sma_update_(std::vector<Tensor> slow, std::vector<Tensor> fast, double alpha, bool reset) {
  if (slow.size() != fast.size()) return false;
  std::vector<Piece> pairs;
  std::vector<int64_t> first{0};
  pairs.reserve(slow.size());
  first.reserve(slow.size() + 1);
  for (size_t t = 0; t < slow.size(); ++t) {
    const int32_t code = pair_code(slow[t], fast[t]);
    if (code < 0 || !slow[t].is_cpu() || !alike(slow[t], fast[t])) return false;
    const int32_t s_size = static_cast<int32_t>(slow[t].element_size());
    const int32_t f_size = static_cast<int32_t>(fast[t].element_size());
    pairs.push_back({slow[t].mutable_data_ptr(), fast[t].mutable_data_ptr(), slow[t].numel(), code, s_size, f_size});
    if (overlap(slow[t], fast[t])) return false;
    first.push_back(first.back() + pairs.back().n);
  }
  parallel_over_list(first, [&](size_t t, int64_t begin, int64_t end) {
    Piece piece = pairs[t];
    piece.slow = advance(piece.slow, begin, piece.slow_size);
    piece.fast = advance(piece.fast, begin, piece.fast_size);
    piece.n = end - begin;
    run_piece(piece, alpha, reset);
  });
  return true;
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cpp, m) {
  m.def("sma_update_(Tensor(a!)[] slow, Tensor(b!)[] fast, float alpha, bool reset) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("sma_update_", TORCH_BOX(&lic_fast::sma_update_));
}
