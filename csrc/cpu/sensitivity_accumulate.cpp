// Sums of the weights' sensitivities over a list of tensors, one pass:
//     s <- s + |w * g|  (taylor),  g * g  (fisher)  or  |g|  (magnitude);  a term that is not finite counts as 0
// Reads s, w and g once and writes s once: 16 bytes an element in fp32; fisher and magnitude do not read w. The whole
// list is one parallel region over its elements. Takes w and g fp32 or bf16 with s fp32, and all three fp64; s has one
// dimension, w and g are dense and laid out alike: elements pair in the order of memory. A tensor whose g is empty is
// left alone. Arithmetic is unfused, in s's dtype.
#include <cmath>
#include <limits>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace lic_fast {
namespace {

enum Kind : int64_t { kTaylor, kFisher, kMagnitude, kKinds };

struct Piece {  // of one tensor
  void* s;
  const void* w;
  const void* g;
  int64_t n;
  int32_t type;  // of w and g
  int32_t size;  // of their elements
};

template <class T, class Acc, Kind kind>
LIC_FAST_INLINE void accumulate(const Piece& c) {
  Acc* __restrict__ s = static_cast<Acc*>(c.s);
  const T* __restrict__ w = static_cast<const T*>(c.w);
  const T* __restrict__ g = static_cast<const T*>(c.g);
  for (int64_t i = 0; i < c.n; ++i) {
    const Acc slope = convert<Acc>(g[i]);
    Acc term = kind == kTaylor ? convert<Acc>(w[i]) * slope : kind == kFisher ? slope * slope : slope;
    term = std::fabs(term);
    s[i] += term <= std::numeric_limits<Acc>::max() ? term : Acc(0);  // false for NaN
  }
}

template <class T, class Acc>
LIC_FAST_INLINE void by_kind(const Piece& c, int64_t kind) {
  switch (kind) {
    case kTaylor: return accumulate<T, Acc, kTaylor>(c);
    case kFisher: return accumulate<T, Acc, kFisher>(c);
    default: return accumulate<T, Acc, kMagnitude>(c);
  }
}

template <class Isa>
LIC_FAST_INLINE void run_piece_body(const Piece& c, int64_t kind) {
  switch (c.type) {
    case kFloat32: return by_kind<float, float>(c, kind);
    case kBFloat16: return by_kind<BFloat16, float>(c, kind);
    default: return by_kind<double, double>(c, kind);
  }
}

LIC_FAST_SIMD_VARIANTS(run_piece, (const Piece& c, int64_t kind), (c, kind));

bool walkable(const Tensor& s, const Tensor& w, const Tensor& g) {
  const int32_t type = dtype_code(w);
  if (type != kFloat32 && type != kBFloat16 && type != kFloat64) return false;
  if (dtype_code(s) != (type == kFloat64 ? kFloat64 : kFloat32)) return false;
  if (!s.is_cpu() || !w.is_cpu() || s.dim() != 1 || !s.is_contiguous() || s.numel() != w.numel()) return false;
  if (g.numel() == 0) return true;
  return dtype_code(g) == type && alike(w, g) && !overlap(s, w) && !overlap(s, g);
}

// Returns false, having written nothing, where the lists are not what the loops can walk.
bool sensitivity_accumulate_(std::vector<Tensor> s, std::vector<Tensor> w, std::vector<Tensor> g, int64_t kind) {
  if (s.size() != w.size() || g.size() != w.size() || kind < 0 || kind >= kKinds) return false;
  std::vector<Piece> pieces;
  std::vector<int64_t> first{0};
  pieces.reserve(w.size());
  first.reserve(w.size() + 1);
  for (size_t t = 0; t < w.size(); ++t) {
    if (!walkable(s[t], w[t], g[t])) return false;
    if (g[t].numel() == 0) continue;
    pieces.push_back({s[t].mutable_data_ptr(), w[t].const_data_ptr(), g[t].const_data_ptr(), w[t].numel(),
                      dtype_code(w[t]), static_cast<int32_t>(w[t].element_size())});
    first.push_back(first.back() + pieces.back().n);
  }
  parallel_over_list(first, [&](size_t t, int64_t begin, int64_t end) {
    Piece piece = pieces[t];
    piece.s = advance(piece.s, begin, piece.type == kFloat64 ? 8 : 4);
    piece.w = advance(piece.w, begin, piece.size);
    piece.g = advance(piece.g, begin, piece.size);
    piece.n = end - begin;
    run_piece(piece, kind);
  });
  return true;
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cpp, m) {
  m.def("sensitivity_accumulate_(Tensor(a!)[] s, Tensor[] params, Tensor[] grads, int kind) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("sensitivity_accumulate_", TORCH_BOX(&lic_fast::sensitivity_accumulate_));
}
