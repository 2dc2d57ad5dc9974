// Element-wise affine reconstruction: out_i = k_i * refs[mode_i] + d_i where tied_i, else w_i; and its gradients.
//
// Forward, fp32, tied mask given: reads w, k, d (4 bytes each), mode and tied (1 each), writes out (4): 18 bytes an
// element, every byte once; refs (M values) stay in cache. A list of tensors is one parallel region over fixed chunks.
// Backward: one pass; the gradient of refs is summed in fp64 (of products in fp32 where w is) per chunk, then over the
// chunks in their order, so that it does not depend on the number of threads. Takes w fp32, bf16, fp64; k, d and refs
// of w's dtype, or fp32 where w is bf16; mode uint8, int16, int32. Tensors must be dense and laid out alike.
#include <atomic>
#include <limits>

#include "common/embedding.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace lic_fast {
namespace {

constexpr int64_t kChunk = 1 << 15;
constexpr int64_t kBlock = 1 << 11;
constexpr int64_t kLanes = 8;  // divides kBlock

struct Chunk {    // a stretch of one tensor
  const void* w;  // backward: the gradient of out
  void* out;      // backward: the gradient of w, or null
  const void* k;
  const void* d;
  const void* mode;
  const uint8_t* tied;  // null where every element is tied
  int64_t n;
  int32_t types;  // which dtypes of (w, k)
  int32_t mode_type;
  void* grad_k;  // backward only; null where not asked for
  void* grad_d;
};

enum Types : int32_t { kF32F32, kBF16F32, kBF16BF16, kF64F64 };
constexpr int64_t kSizes[][2] = {{4, 4}, {2, 4}, {2, 2}, {8, 8}};  // bytes of w and k

int32_t types_code(const Tensor& w, const Tensor& k) {  // -1 where no loop reads the pair
  const int32_t a = dtype_code(w), b = dtype_code(k);
  if (a == kFloat32 && b == kFloat32) return kF32F32;
  if (a == kBFloat16 && b == kFloat32) return kBF16F32;
  if (a == kBFloat16 && b == kBFloat16) return kBF16BF16;
  return a == kFloat64 && b == kFloat64 ? kF64F64 : -1;
}

// The loops work on blocks that fit the first-level cache: one look-up of refs into `r`, then plain loops over it.
template <class Isa, class W, class P, class Mode, class Acc>
LIC_FAST_INLINE void forward(const Chunk& c, const Acc* refs, int64_t modes) {
  alignas(64) Acc r[kBlock];
  for (int64_t begin = 0; begin < c.n; begin += kBlock) {
    const int64_t n = std::min(kBlock, c.n - begin);
    // out may be w itself (in place); element i is read before it is written, and nothing else overlaps
    const W* w = static_cast<const W*>(c.w) + begin;
    W* out = static_cast<W*>(c.out) + begin;
    const P* k = static_cast<const P*>(c.k) + begin;
    const P* d = static_cast<const P*>(c.d) + begin;
    LookUp<Isa, Acc, Mode>::run(refs, modes, static_cast<const Mode*>(c.mode) + begin, n, r);
    if (c.tied) {
      const uint8_t* tied = c.tied + begin;
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        const W value = convert<W>(convert<Acc>(k[i]) * r[i] + convert<Acc>(d[i]));
        const W kept = w[i];
        out[i] = select(tied[i] != 0, value, kept);
      }
    } else {
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) out[i] = convert<W>(convert<Acc>(k[i]) * r[i] + convert<Acc>(d[i]));
    }
  }
}

template <class W, class P, class Acc>
LIC_FAST_INLINE void backward_elements(const Chunk& c, int64_t begin, int64_t n, const Acc* r, const uint8_t* tied) {
  const W* grad = static_cast<const W*>(c.w) + begin;
  if (c.out) {
    W* grad_w = static_cast<W*>(c.out) + begin;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) grad_w[i] = select(tied[i] != 0, W{}, grad[i]);
  }
  if (c.grad_k) {
    P* grad_k = static_cast<P*>(c.grad_k) + begin;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) grad_k[i] = select(tied[i] != 0, convert<P>(convert<Acc>(grad[i]) * r[i]), P{});
  }
  if (c.grad_d) {
    P* grad_d = static_cast<P*>(c.grad_d) + begin;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) grad_d[i] = select(tied[i] != 0, convert<P>(convert<Acc>(grad[i])), P{});
  }
}

// sums: kLanes tables of `modes` sums. A table and a place in the code for each lane, so that neighbours of one mode
// do not wait for each other's store.
template <class Acc, class Mode>
LIC_FAST_INLINE void add_by_mode(const Acc* term, const Mode* mode, int64_t n, int64_t modes, double* sums) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma GCC unroll 8
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane * modes + mode[i + lane]] += term[i + lane];
  }
  for (; i < n; ++i) sums[mode[i]] += term[i];
}

template <class Isa, class W, class P, class Mode, class Acc>
LIC_FAST_INLINE void backward(const Chunk& c, const Acc* refs, int64_t modes, double* sums) {
  alignas(64) Acc r[kBlock];
  alignas(64) Acc term[kBlock];
  alignas(64) uint8_t all[kBlock];
  std::memset(all, 1, sizeof all);
  for (int64_t begin = 0; begin < c.n; begin += kBlock) {
    const int64_t n = std::min(kBlock, c.n - begin);
    const Mode* mode = static_cast<const Mode*>(c.mode) + begin;
    const uint8_t* tied = c.tied ? c.tied + begin : all;
    LookUp<Isa, Acc, Mode>::run(refs, modes, mode, n, r);
    backward_elements<W, P, Acc>(c, begin, n, r, tied);
    if (!sums) continue;
    const W* grad = static_cast<const W*>(c.w) + begin;
    const P* k = static_cast<const P*>(c.k) + begin;
    for (int64_t i = 0; i < n; ++i) {
      term[i] = select(tied[i] != 0, convert<Acc>(k[i]) * convert<Acc>(grad[i]), Acc(0));
    }
    add_by_mode(term, mode, n, modes, sums);
  }
}

template <class Isa, class W, class P, class Acc>
LIC_FAST_INLINE void by_mode(const Chunk& c, const void* refs_ptr, int64_t modes, double* sums, bool is_backward) {
  const Acc* refs = static_cast<const Acc*>(refs_ptr);
  if (!is_backward) {
    switch (c.mode_type) {
      case kUInt8: return forward<Isa, W, P, uint8_t, Acc>(c, refs, modes);
      case kInt16: return forward<Isa, W, P, int16_t, Acc>(c, refs, modes);
      default: return forward<Isa, W, P, int32_t, Acc>(c, refs, modes);
    }
  }
  switch (c.mode_type) {
    case kUInt8: return backward<Isa, W, P, uint8_t, Acc>(c, refs, modes, sums);
    case kInt16: return backward<Isa, W, P, int16_t, Acc>(c, refs, modes, sums);
    default: return backward<Isa, W, P, int32_t, Acc>(c, refs, modes, sums);
  }
}

template <class Isa>
LIC_FAST_INLINE void run_chunk_body(const Chunk& c, const void* refs, int64_t modes, double* sums, bool is_backward) {
  switch (c.types) {
    case kF32F32: return by_mode<Isa, float, float, float>(c, refs, modes, sums, is_backward);
    case kBF16F32: return by_mode<Isa, BFloat16, float, float>(c, refs, modes, sums, is_backward);
    case kBF16BF16: return by_mode<Isa, BFloat16, BFloat16, float>(c, refs, modes, sums, is_backward);
    default: return by_mode<Isa, double, double, double>(c, refs, modes, sums, is_backward);
  }
}

LIC_FAST_SIMD_VARIANTS(run_chunk, (const Chunk& c, const void* refs, int64_t modes, double* sums, bool is_backward),
                       (c, refs, modes, sums, is_backward));

template <class Mode>
LIC_FAST_INLINE int64_t count_outside(const void* mode_ptr, int64_t n, int64_t modes) {
  const Mode* __restrict__ mode = static_cast<const Mode*>(mode_ptr);
  if (modes > std::numeric_limits<Mode>::max() && std::numeric_limits<Mode>::min() == 0) return 0;
  int32_t low = 0, high = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t m = mode[i];
    low = m < low ? m : low;
    high = m > high ? m : high;
  }
  return n > 0 && (low < 0 || high >= modes);
}

template <class Isa>
LIC_FAST_INLINE void outside_body(const Chunk& c, int64_t modes, int64_t* result) {
  switch (c.mode_type) {
    case kUInt8: *result = count_outside<uint8_t>(c.mode, c.n, modes); return;
    case kInt16: *result = count_outside<int16_t>(c.mode, c.n, modes); return;
    default: *result = count_outside<int32_t>(c.mode, c.n, modes); return;
  }
}

LIC_FAST_SIMD_VARIANTS(outside, (const Chunk& c, int64_t modes, int64_t* result), (c, modes, result));

// refs in the accumulation dtype (fp32, or fp64 for fp64), as the loops read them
std::vector<double> widened(const Tensor& refs) {
  const int64_t n = refs.numel();
  std::vector<double> storage(n + 1);
  const void* data = refs.const_data_ptr();
  float* as_float = reinterpret_cast<float*>(storage.data());
  switch (dtype_code(refs)) {
    case kFloat64: std::memcpy(storage.data(), data, n * sizeof(double)); break;
    case kFloat32: std::memcpy(as_float, data, n * sizeof(float)); break;
    case kBFloat16:
      for (int64_t m = 0; m < n; ++m) as_float[m] = convert<float>(static_cast<const BFloat16*>(data)[m]);
      break;
    default: STD_TORCH_CHECK(false, "affine_reconstruct: a dtype of refs that the C++ kernel does not read");
  }
  return storage;
}

Chunk stretch(const Chunk& whole, int64_t begin, int64_t end) {
  const int64_t w_size = kSizes[whole.types][0], k_size = kSizes[whole.types][1];
  const int64_t mode_size = whole.mode_type == kUInt8 ? 1 : whole.mode_type == kInt16 ? 2 : 4;
  Chunk c = whole;
  c.n = end - begin;
  c.w = advance(whole.w, begin, w_size);
  c.out = advance(whole.out, begin, w_size);
  c.k = advance(whole.k, begin, k_size);
  c.d = advance(whole.d, begin, k_size);
  c.mode = advance(whole.mode, begin, mode_size);
  c.tied = advance(whole.tied, begin, 1);
  c.grad_k = advance(whole.grad_k, begin, k_size);
  c.grad_d = advance(whole.grad_d, begin, k_size);
  return c;
}

struct List {
  std::vector<Chunk> tensors;
  std::vector<int64_t> first{0};

  void add(const Chunk& whole) {
    tensors.push_back(whole);
    first.push_back(first.back() + whole.n);
  }

  bool any_mode_outside(int64_t modes) const {
    std::atomic<bool> any{false};
    parallel_over_list(first, [&](size_t t, int64_t begin, int64_t end) {
      int64_t bad = 0;
      outside(stretch(tensors[t], begin, end), modes, &bad);
      if (bad) any = true;
    });
    return any;
  }

  // Returns false, having written nothing, where a mode lies outside [0, M).
  bool run_forward(const Tensor& refs) const {
    if (any_mode_outside(refs.numel())) return false;
    const std::vector<double> table = widened(refs);
    parallel_over_list(first, [&](size_t t, int64_t begin, int64_t end) {
      run_chunk(stretch(tensors[t], begin, end), table.data(), refs.numel(), nullptr, false);
    });
    return true;
  }
};

Chunk whole_tensor(const Tensor& w, const Tensor& out, const Tensor& k, const Tensor& d, const Tensor& mode,
                   const Tensor* tied) {
  for (const Tensor* t : {&out, &k, &d, &mode}) check_same_numel(w, *t);
  if (tied) check_same_numel(w, *tied);
  STD_TORCH_CHECK(types_code(w, k) >= 0, "affine_reconstruct: dtypes that the C++ kernel does not read");
  Chunk whole{};
  whole.w = w.const_data_ptr();
  whole.out = out.mutable_data_ptr();
  whole.k = k.const_data_ptr();
  whole.d = d.const_data_ptr();
  whole.mode = mode.const_data_ptr();
  whole.tied = tied ? static_cast<const uint8_t*>(tied->const_data_ptr()) : nullptr;
  whole.n = w.numel();
  whole.types = types_code(w, k);
  whole.mode_type = dtype_code(mode);
  return whole;
}

bool affine_reconstruct_out(Tensor w, Tensor k, Tensor d, Tensor mode, Tensor refs, std::optional<Tensor> tied,
                            Tensor out) {
  List list;
  list.add(whole_tensor(w, out, k, d, mode, tied ? &*tied : nullptr));
  return list.run_forward(refs);
}

// 0: done. 1: the lists are not what the kernel can walk, nothing is written. 2: a mode lies outside [0, M), likewise.
int64_t affine_reconstruct_(std::vector<Tensor> w, std::vector<Tensor> k, std::vector<Tensor> d,
                            std::vector<Tensor> mode, Tensor refs, std::vector<Tensor> tied) {
  if (!walkable(w, k, d, mode, refs, tied, false, types_code)) return 1;
  List list;
  for (size_t t = 0; t < w.size(); ++t) {
    list.add(whole_tensor(w[t], w[t], k[t], d[t], mode[t], tied.empty() ? nullptr : &tied[t]));
  }
  return list.run_forward(refs) ? 0 : 2;
}

// grad_w, grad_k, grad_d, grad_refs are written where they have elements; grad_refs is fp64.
void affine_reconstruct_bwd_out(Tensor grad, Tensor k, Tensor mode, Tensor refs, std::optional<Tensor> tied,
                                Tensor grad_w, Tensor grad_k, Tensor grad_d, Tensor grad_refs) {
  const int64_t n = grad.numel(), modes = refs.numel();
  check_same_numel(grad, k);
  check_same_numel(grad, mode);
  const auto wanted = [n](const Tensor& t) {
    STD_TORCH_CHECK(t.numel() == n || t.numel() == 0, "affine_reconstruct_bwd: a gradient of another size");
    return t.numel() ? t.mutable_data_ptr() : nullptr;
  };
  Chunk whole{};
  whole.w = grad.const_data_ptr();
  whole.out = wanted(grad_w);
  whole.k = whole.d = k.const_data_ptr();
  whole.mode = mode.const_data_ptr();
  whole.tied = tied ? static_cast<const uint8_t*>(tied->const_data_ptr()) : nullptr;
  whole.n = n;
  whole.types = types_code(grad, k);
  STD_TORCH_CHECK(whole.types >= 0, "affine_reconstruct_bwd: dtypes that the C++ kernel does not read");
  whole.mode_type = dtype_code(mode);
  whole.grad_k = wanted(grad_k);
  whole.grad_d = wanted(grad_d);
  // Partial sums cost chunks * kLanes * M doubles: longer chunks where M is large, never a function of the thread
  // count.
  const int64_t chunk = std::max<int64_t>(kChunk, 4 * kLanes * modes);
  List list;
  list.add(whole);
  STD_TORCH_CHECK(!list.any_mode_outside(modes), "affine_reconstruct_bwd: a mode outside [0, M)");
  const int64_t chunks = (n + chunk - 1) / chunk;
  const bool want_refs = grad_refs.numel() > 0;
  std::vector<double> partial(want_refs ? chunks * kLanes * modes : 0);
  const std::vector<double> table = widened(refs);
  const int64_t grain = std::max<int64_t>(1, kSerialElements / chunk);
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) {
      double* sums = want_refs ? partial.data() + i * kLanes * modes : nullptr;
      run_chunk(stretch(whole, i * chunk, std::min(n, (i + 1) * chunk)), table.data(), modes, sums, true);
    }
  });
  if (!want_refs) return;
  double* sums = static_cast<double*>(grad_refs.mutable_data_ptr());
  for (int64_t m = 0; m < modes; ++m) {
    double sum = 0;
    for (int64_t i = 0; i < chunks * kLanes; ++i) sum += partial[i * modes + m];
    sums[m] = sum;
  }
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cpp, m) { lic_fast::define_affine_reconstruct(m); }

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("affine_reconstruct_out", TORCH_BOX(&lic_fast::affine_reconstruct_out));
  m.impl("affine_reconstruct_", TORCH_BOX(&lic_fast::affine_reconstruct_));
  m.impl("affine_reconstruct_bwd_out", TORCH_BOX(&lic_fast::affine_reconstruct_bwd_out));
}
