// One step of SOAP's QR iteration for stacks of factors GG [N, d, d] and bases Q [N, d, d], by Cholesky-QR:
//     P = GG Q, fp64;  order = columns by diag(Q^T P), largest first;  W = P[:, order] / column norms
//     pass 1, fp64:     G = W^T W = L L^T,  new = round(W L^-T)
//     pass 2, as GG is: the same from new, where new is not orthogonal to rounding yet
//     rotation = Q^T new
// Served is what succeeded: pivots positive, everything finite, new orthogonal. Elsewhere new is Q[:, order] (Q itself
// where GG is not finite), and the caller repairs it.
//
// P is taken in fp64 because columns of small eigenvalues are differences of large numbers: with fp32's rounding their
// directions would be that of the rounding, another one in every library.
//
// Whether pass 2 is needed is measured, not assumed: E = new^T new - I is multiplied by 16 vectors of signs, whose
// squares average to the squared norm of each row of E. Pass 1 loses eps64 * condition(W)^2, which for factors met in
// training is below fp32's rounding, and then pass 2 would only add its own and take a third more time.
//
// One matrix is one thread's from beginning to end. Threads draw matrices from a queue by falling size, so that the
// results do not depend on their number and the last one finishes soon after the first.
#include <atomic>
#include <numeric>
#include <type_traits>

#include "cpu/cholesky.h"
#include "cpu/parallel.h"

namespace lic_fast {
namespace {

constexpr int64_t kProbes = 16;
constexpr double kOnce = 1, kTwice = 4;  // departures allowed after each pass, in units of eps sqrt(d)

enum Slot : int {
  kProduct = Workspace::kFirstFree,
  kFactor,
  kBasis,
  kWide,
  kGram,
  kNarrow,
  kNarrowGram,
  kPanel,
  kColumns,
  kSketch,
  kResidual,
  kSquares
};

struct Stack {
  const void* gg;
  const void* q;
  void* basis;
  int64_t* order;
  void* rotation;
  bool* served;
  int64_t count, d;
  bool wide;
};

template <class T>
LIC_FAST_INLINE void all_finite(const T* x, int64_t n, bool* finite) {
  int64_t bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= !(std::abs(x[i]) <= std::numeric_limits<T>::max());
  *finite = bad == 0;
}

// Per column: the Rayleigh quotient, and the factor that makes its norm 1 (0 for a zero column). Squares could
// overflow: columns are brought to a largest entry of about 1 first.
LIC_FAST_INLINE void column_sums(int64_t d, const double* q, const double* p, double* quotient, double* scale,
                                 double* norm) {
  for (int64_t j = 0; j < d; ++j) quotient[j] = 0, scale[j] = 0, norm[j] = 0;
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = 0; j < d; ++j) scale[j] = std::max(scale[j], std::abs(p[i * d + j]));
  }
  for (int64_t j = 0; j < d; ++j) {  // the inverse of a subnormal would overflow
    scale[j] = scale[j] > 0 ? 1 / std::max(scale[j], 1e-300) : 1;
  }
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = 0; j < d; ++j) {
      const double value = p[i * d + j];
      quotient[j] += value * q[i * d + j];
      norm[j] += (value * scale[j]) * (value * scale[j]);
    }
  }
  for (int64_t j = 0; j < d; ++j) scale[j] *= norm[j] > 0 ? 1 / std::sqrt(norm[j]) : 0;
}

LIC_FAST_INLINE void gather_scaled(int64_t d, const double* p, const int64_t* order, const double* scale, bool sorted,
                                   double* w, int64_t step) {
  for (int64_t i = 0; i < d; ++i) {
    if (sorted) {
      for (int64_t j = 0; j < d; ++j) w[i * step + j] = p[i * d + j] * scale[j];
    } else {
      for (int64_t j = 0; j < d; ++j) w[i * step + j] = p[i * d + order[j]] * scale[j];
    }
  }
}

template <class From, class To>
LIC_FAST_INLINE void copy_rows(int64_t d, const From* from, int64_t from_step, To* to, int64_t to_step) {
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = 0; j < d; ++j) to[i * to_step + j] = static_cast<To>(from[i * from_step + j]);
  }
}

template <class Isa>
LIC_FAST_INLINE void is_finite_body(bool wide, const void* x, int64_t n, bool* finite) {
  wide ? all_finite(static_cast<const double*>(x), n, finite) : all_finite(static_cast<const float*>(x), n, finite);
}
LIC_FAST_SIMD_VARIANTS(is_finite, (bool wide, const void* x, int64_t n, bool* finite), (wide, x, n, finite));

template <class Isa>
LIC_FAST_INLINE void sum_columns_body(int64_t d, const double* q, const double* p, double* sums) {
  column_sums(d, q, p, sums, sums + d, sums + 2 * d);
}
LIC_FAST_SIMD_VARIANTS(sum_columns, (int64_t d, const double* q, const double* p, double* sums), (d, q, p, sums));

template <class Isa>
LIC_FAST_INLINE void sort_columns_body(int64_t d, const double* p, const int64_t* order, const double* scale,
                                       bool sorted, double* w, int64_t step) {
  gather_scaled(d, p, order, scale, sorted, w, step);
}
LIC_FAST_SIMD_VARIANTS(sort_columns,
                       (int64_t d, const double* p, const int64_t* order, const double* scale, bool sorted, double* w,
                        int64_t step),
                       (d, p, order, scale, sorted, w, step));

template <class Isa>
LIC_FAST_INLINE void copy_body(bool from_wide, bool to_wide, int64_t d, const void* from, int64_t from_step, void* to,
                               int64_t to_step) {
  const auto* narrow = static_cast<const float*>(from);
  const auto* wide = static_cast<const double*>(from);
  if (to_wide) {
    return from_wide ? copy_rows(d, wide, from_step, static_cast<double*>(to), to_step)
                     : copy_rows(d, narrow, from_step, static_cast<double*>(to), to_step);
  }
  from_wide ? copy_rows(d, wide, from_step, static_cast<float*>(to), to_step)
            : copy_rows(d, narrow, from_step, static_cast<float*>(to), to_step);
}
LIC_FAST_SIMD_VARIANTS(copy,
                       (bool from_wide, bool to_wide, int64_t d, const void* from, int64_t from_step, void* to,
                        int64_t to_step),
                       (from_wide, to_wide, d, from, from_step, to, to_step));

// Zeros in what factor_and_solve takes beyond [d, d].
template <class T>
void clear_padding(int64_t d, T* x, int64_t step) {
  for (int64_t i = 0; i < d; ++i) std::fill(x + i * step + d, x + (i + 1) * step, T(0));
  std::fill(x + d * step, x + padded_rows(d) * step, T(0));
}

// W <- the orthogonal factor of W [d, d] (padding zero); false where it does not exist.
template <class T>
bool orthogonalise(int64_t d, T* w, int64_t step, int gram_slot, Workspace& workspace) {
  T* gram = workspace.get<T>(gram_slot, padded_rows(d) * step);
  symmetric<T>(d, d, T(1), w, 1, step, T(0), gram, step, workspace);
  clear_padding(d, gram, step);
  return factor_and_solve<T>(d, gram, step, d, w, step, kPanel, workspace);
}

// The largest norm of a row of E = X^T X - I, as 16 vectors of signs see it, in units of eps sqrt(d).
template <class T>
double departure(int64_t d, const T* x, Workspace& workspace) {
  T* residual = workspace.get<T>(kResidual, d * kProbes);  // signs, then signs E
  uint64_t state = 0x9E3779B97F4A7C15u;
  for (int64_t j = 0; j < d; ++j) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    for (int64_t k = 0; k < kProbes; ++k) residual[k * d + j] = (state >> (40 + k)) & 1 ? T(1) : T(-1);
  }
  T* sketch = workspace.get<T>(kSketch, d * kProbes);
  gemm<T>(kProbes, d, d, T(1), residual, d, 1, x, 1, d, T(0), sketch, d, workspace);
  gemm<T>(kProbes, d, d, T(1), sketch, d, 1, x, d, 1, T(-1), residual, d, workspace);
  double* squares = workspace.get<double>(kSquares, d);
  std::fill_n(squares, d, 0.0);
  for (int64_t k = 0; k < kProbes; ++k) {
    for (int64_t j = 0; j < d; ++j) squares[j] += static_cast<double>(residual[k * d + j]) * residual[k * d + j];
  }
  double most = 0;
  for (int64_t j = 0; j < d; ++j) {
    if (!(squares[j] <= most)) most = squares[j];
    if (most != most) return std::numeric_limits<double>::infinity();
  }
  return std::sqrt(most / (kProbes * d)) / std::numeric_limits<T>::epsilon();
}

// basis <- the orthogonal factor of the sorted, scaled columns of P.
template <class T>
bool cholesky_qr(int64_t d, const double* p, const int64_t* order, const double* scale, bool sorted, T* basis,
                 Workspace& workspace) {
  constexpr bool kIsWide = std::is_same_v<T, double>;
  const int64_t step = padded_step(d);
  double* wide = workspace.get<double>(kWide, padded_rows(d) * step);
  sort_columns(d, p, order, scale, sorted, wide, step);
  clear_padding(d, wide, step);
  if (!orthogonalise(d, wide, step, kGram, workspace)) return false;
  if constexpr (!kIsWide) {
    copy(true, false, d, wide, step, basis, d);
    if (departure(d, basis, workspace) <= kOnce) return true;
  }
  T* again;
  if constexpr (kIsWide) {
    again = wide;
  } else {
    again = workspace.get<T>(kNarrow, padded_rows(d) * step);
    copy(false, false, d, basis, d, again, step);
    clear_padding(d, again, step);
  }
  if (!orthogonalise(d, again, step, kNarrowGram, workspace)) return false;
  copy(kIsWide, kIsWide, d, again, step, basis, d);
  return departure(d, basis, workspace) <= kTwice;
}

// Positions by falling value, equal ones in their order, NaN first: torch.argsort(descending=True, stable=True).
bool sort_descending(int64_t d, const double* value, int64_t* order) {
  std::iota(order, order + d, 0);
  const auto before = [&](int64_t a, int64_t b) {
    return value[a] > value[b] || (value[a] != value[a] && value[b] == value[b]);
  };
  if (std::is_sorted(order, order + d, before)) return true;
  std::stable_sort(order, order + d, before);
  return false;
}

inline const double* in_double(int64_t, const double* x, int, Workspace&) { return x; }
inline const double* in_double(int64_t d, const float* x, int slot, Workspace& workspace) {
  double* wide = workspace.get<double>(slot, d * d);
  copy(false, true, d, x, d, wide, d);
  return wide;
}

template <class T>
void refresh(const Stack& s, int64_t index, Workspace& workspace) {
  constexpr bool kIsWide = std::is_same_v<T, double>;
  const int64_t d = s.d, offset = index * d * d;
  if (d == 0) {
    s.served[index] = true;
    return;
  }
  const T* gg = static_cast<const T*>(s.gg) + offset;
  const T* q = static_cast<const T*>(s.q) + offset;
  T* basis = static_cast<T*>(s.basis) + offset;
  int64_t* order = s.order + index * d;
  bool finite, sorted = true, served = false;
  is_finite(kIsWide, gg, d * d, &finite);
  if (finite) {
    double* p = workspace.get<double>(kProduct, d * d);
    double* sums = workspace.get<double>(kColumns, 4 * d);
    const double* wide_gg = in_double(d, gg, kFactor, workspace);
    const double* wide_q = in_double(d, q, kBasis, workspace);
    gemm<double>(d, d, d, 1, wide_gg, d, 1, wide_q, d, 1, 0, p, d, workspace);
    sum_columns(d, wide_q, p, sums);
    sorted = sort_descending(d, sums, order);
    for (int64_t j = 0; j < d; ++j) sums[3 * d + j] = sums[d + order[j]];
    served = cholesky_qr<T>(d, p, order, sums + 3 * d, sorted, basis, workspace);
  } else {
    std::iota(order, order + d, 0);
  }
  if (!served) {
    for (int64_t i = 0; i < d; ++i) {
      for (int64_t j = 0; j < d; ++j) basis[i * d + j] = q[i * d + order[j]];
    }
  }
  s.served[index] = served;
  gemm<T>(d, d, d, T(1), q, 1, d, basis, d, 1, T(0), static_cast<T*>(s.rotation) + offset, d, workspace);
}

// Whether `tensor` is on the CPU, contiguous, of `type`, and [count, d, ...] with `dims` dimensions.
bool fits(const Tensor& tensor, ScalarType type, int64_t count, int64_t d, int64_t dims) {
  if (!tensor.is_cpu() || !tensor.is_contiguous() || tensor.scalar_type() != type || tensor.dim() != dims) return false;
  if (tensor.size(0) != count) return false;
  for (int64_t i = 1; i < dims; ++i) {
    if (tensor.size(i) != d) return false;
  }
  return true;
}

// Returns false, having written nothing, where the lists are not stacks that the loops can walk.
bool refresh_eigenbasis(std::vector<Tensor> GG, std::vector<Tensor> Q, std::vector<Tensor> new_basis,
                        std::vector<Tensor> order, std::vector<Tensor> rotation, std::vector<Tensor> served) {
  const size_t n = GG.size();
  if (Q.size() != n || new_basis.size() != n || order.size() != n || rotation.size() != n || served.size() != n) {
    return false;
  }
  std::vector<Stack> stacks;
  for (size_t t = 0; t < n; ++t) {
    if (GG[t].dim() != 3) return false;
    const ScalarType type = GG[t].scalar_type();
    const int64_t count = GG[t].size(0), d = GG[t].size(1);
    if (type != ScalarType::Float && type != ScalarType::Double) return false;
    if (!fits(GG[t], type, count, d, 3) || !fits(Q[t], type, count, d, 3) || !fits(new_basis[t], type, count, d, 3) ||
        !fits(rotation[t], type, count, d, 3) || !fits(order[t], ScalarType::Long, count, d, 2) ||
        !fits(served[t], ScalarType::Bool, count, d, 1)) {
      return false;
    }
    if (count == 0) continue;
    for (const Tensor* input : {&GG[t], &Q[t]}) {
      for (const Tensor* output : {&new_basis[t], &order[t], &rotation[t], &served[t]}) {
        if (overlap(*input, *output)) return false;
      }
    }
    stacks.push_back({GG[t].const_data_ptr(), Q[t].const_data_ptr(), new_basis[t].mutable_data_ptr(),
                      static_cast<int64_t*>(order[t].mutable_data_ptr()), rotation[t].mutable_data_ptr(),
                      static_cast<bool*>(served[t].mutable_data_ptr()), count, d, type == ScalarType::Double});
  }
  std::stable_sort(stacks.begin(), stacks.end(), [](const Stack& a, const Stack& b) { return a.d > b.d; });
  std::vector<std::pair<size_t, int64_t>> queue;
  for (size_t t = 0; t < stacks.size(); ++t) {
    for (int64_t i = 0; i < stacks[t].count; ++i) queue.emplace_back(t, i);
  }
  std::atomic<size_t> next{0};
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
    Workspace workspace;
    for (size_t at; (at = next.fetch_add(1)) < queue.size();) {
      const auto [t, i] = queue[at];
      stacks[t].wide ? refresh<double>(stacks[t], i, workspace) : refresh<float>(stacks[t], i, workspace);
    }
  });
  return true;
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cpp, m) {
  m.def(
      "refresh_eigenbasis(Tensor[] GG, Tensor[] Q, Tensor(a!)[] new_basis, Tensor(b!)[] order, "
      "Tensor(c!)[] rotation, Tensor(d!)[] served) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("refresh_eigenbasis", TORCH_BOX(&lic_fast::refresh_eigenbasis));
}
