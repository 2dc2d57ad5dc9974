// Adam over a list of dense tensors, on the CPU; the reference is lic_fast/reference/adam_update.py:
//     m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  u = m / (sqrt(v) + eps);  p <- (p - step_size u) (1 - lr wd)
// Threads take whole tensors, the longest first. A tensor's gradient is read twice: whether it is finite must be known
// before anything is written. normalize_grads needs the root mean square of u before p moves: u then waits in scratch.
#include "cpu/optim.h"

namespace lic_fast {
namespace {

struct Job {
  void *p, *g, *m, *v;
  int64_t n;
  int64_t* counts;
  Hyper h;
  int32_t p_code, g_code;
  bool f64;
};

struct Moves {  // what one tensor's loops need beside the tensor
  double step, decay;
  bool keep;     // u goes to scratch, p stays
  void* update;  // scratch
  double* squares;
};

constexpr int64_t kPiece = 512;

template <class From>
LIC_FAST_INLINE bool finite_of(const void* data, int64_t n) {
  const From* x = static_cast<const From*>(data);
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) most = std::max(most, Magnitude<From>::of(x[i]));
  return most < Magnitude<From>::kNotFinite;
}

template <class Isa>
LIC_FAST_INLINE void is_finite_body(const void* data, int64_t n, int32_t code, bool* finite) {
  *finite = code == kFloat32    ? finite_of<float>(data, n)
            : code == kBFloat16 ? finite_of<BFloat16>(data, n)
                                : finite_of<double>(data, n);
}

LIC_FAST_SIMD_VARIANTS(is_finite, (const void* data, int64_t n, int32_t code, bool* finite), (data, n, code, finite));

// u for a piece of n <= kPiece elements whose gradient lies converted in x; u replaces x.
template <class T>
LIC_FAST_INLINE void direction_of(T* __restrict__ x, T* __restrict__ m, T* __restrict__ v, int64_t n, const Hyper& h) {
  const T b1 = static_cast<T>(h.beta1), c1 = static_cast<T>(1.0 - h.beta1), eps = static_cast<T>(h.eps);
  const T b2 = static_cast<T>(h.beta2), c2 = static_cast<T>(1.0 - h.beta2);
  for (int64_t i = 0; i < n; ++i) {
    const T mean = m[i] * b1 + c1 * x[i], square = v[i] * b2 + c2 * (x[i] * x[i]);
    m[i] = mean;
    v[i] = square;
    x[i] = mean / (std::sqrt(square) + eps);
  }
}

template <class T, class P>
LIC_FAST_INLINE void move_of(P* __restrict__ p, const T* __restrict__ u, int64_t n, double step_in, double decay_in) {
  const T step = static_cast<T>(step_in), decay = static_cast<T>(decay_in);
  for (int64_t i = 0; i < n; ++i) {
    const T value = convert<T>(p[i]) - step * u[i];
    p[i] = convert<P>(value - decay * value);
  }
}

template <class T>
LIC_FAST_INLINE double squares_of(const T* x, int64_t n) {
  double sum[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int l = 0; l < 8; ++l) sum[l] += static_cast<double>(x[i + l]) * static_cast<double>(x[i + l]);
  }
  for (; i < n; ++i) sum[0] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

template <class T>
LIC_FAST_INLINE void load_piece(const Job& job, int64_t at, int64_t n, T* __restrict__ x) {
  if (job.g_code == kFloat32) {
    for (int64_t i = 0; i < n; ++i) x[i] = convert<T>(static_cast<const float*>(job.g)[at + i]);
  } else if (job.g_code == kBFloat16) {
    for (int64_t i = 0; i < n; ++i) x[i] = convert<T>(static_cast<const BFloat16*>(job.g)[at + i]);
  } else {
    for (int64_t i = 0; i < n; ++i) x[i] = convert<T>(static_cast<const double*>(job.g)[at + i]);
  }
}

template <class T>
LIC_FAST_INLINE void move_piece(const Job& job, int64_t at, int64_t n, const T* u, const Moves& moves) {
  if constexpr (sizeof(T) == 4) {
    if (job.p_code == kFloat32) return move_of(static_cast<float*>(job.p) + at, u, n, moves.step, moves.decay);
    if (job.p_code == kBFloat16) return move_of(static_cast<BFloat16*>(job.p) + at, u, n, moves.step, moves.decay);
  }
  move_of(static_cast<double*>(job.p) + at, u, n, moves.step, moves.decay);
}

template <class T>
LIC_FAST_INLINE void walk_of(const Job& job, const Moves& moves) {
  T piece[kPiece];
  double squares = 0;
  for (int64_t at = 0; at < job.n; at += kPiece) {
    const int64_t n = std::min(kPiece, job.n - at);
    T* x = moves.keep ? static_cast<T*>(moves.update) + at : piece;
    load_piece(job, at, n, x);
    direction_of(x, static_cast<T*>(job.m) + at, static_cast<T*>(job.v) + at, n, job.h);
    if (moves.keep) {
      squares += squares_of(x, n);
    } else {
      move_piece(job, at, n, x, moves);
    }
  }
  if (moves.keep) *moves.squares = squares;
}

template <class Isa>
LIC_FAST_INLINE void run_walk_body(const Job& job, const Moves& moves) {
  if (job.f64) {
    walk_of<double>(job, moves);
  } else {
    walk_of<float>(job, moves);
  }
}

LIC_FAST_SIMD_VARIANTS(run_walk, (const Job& job, const Moves& moves), (job, moves));

template <class T>
LIC_FAST_INLINE void finish_of(const Job& job, const Moves& moves, double divisor_in) {
  T* update = static_cast<T*>(moves.update);
  const T divisor = static_cast<T>(divisor_in);
  for (int64_t i = 0; i < job.n; ++i) update[i] /= divisor;
  move_piece(job, 0, job.n, update, moves);
}

template <class Isa>
LIC_FAST_INLINE void run_finish_body(const Job& job, const Moves& moves, double divisor) {
  if (job.f64) {
    finish_of<double>(job, moves, divisor);
  } else {
    finish_of<float>(job, moves, divisor);
  }
}

LIC_FAST_SIMD_VARIANTS(run_finish, (const Job& job, const Moves& moves, double divisor), (job, moves, divisor));

void update(const Job& job, bool correct_bias, bool normalize, Workspace& workspace) {
  bool finite = false;
  is_finite(job.g, job.n, job.g_code, &finite);
  job.counts[finite ? 0 : 1] += 1;
  if (!finite) return;
  double squares = 0;
  Moves moves{step_size(job.h, job.counts[0], correct_bias), job.h.lr * job.h.weight_decay, normalize, nullptr,
              &squares};
  if (normalize) moves.update = workspace.get<double>(Workspace::kFirstFree, job.n);
  run_walk(job, moves);
  if (normalize) run_finish(job, moves, 1e-30 + std::sqrt(squares / static_cast<double>(job.n)));
}

bool add_job(const Tensor& p, const Tensor& g, const Tensor& m, const Tensor& v, std::vector<Job>& jobs) {
  if (!dtypes_fit(p, g, m, v) || !p.is_cpu()) return false;
  if (!alike(p, g) || !alike(p, m) || !alike(p, v)) return false;
  Job job;
  job.p = p.mutable_data_ptr();
  job.g = const_cast<void*>(g.const_data_ptr());
  job.m = m.mutable_data_ptr();
  job.v = v.mutable_data_ptr();
  job.n = p.numel();
  job.p_code = dtype_code(p);
  job.g_code = dtype_code(g);
  job.f64 = dtype_code(m) == kFloat64;
  jobs.push_back(job);
  return true;
}

// Returns false, having written nothing, where the lists are not what the header says.
bool adam_update_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avg,
                  std::vector<Tensor> exp_avg_sq, Tensor counts, Tensor hyper, bool correct_bias,
                  bool normalize_grads) {
  const size_t n = params.size();
  if (grads.size() != n || exp_avg.size() != n || exp_avg_sq.size() != n || !are_tables(counts, hyper, n)) return false;
  std::vector<Job> jobs;
  std::vector<double> costs;
  jobs.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    if (!add_job(params[i], grads[i], exp_avg[i], exp_avg_sq[i], jobs)) return false;
    jobs.back().counts = static_cast<int64_t*>(counts.mutable_data_ptr()) + 2 * i;
    jobs.back().h = hyper_row(hyper, i);
    costs.push_back(20.0 * static_cast<double>(jobs.back().n));
  }
  parallel_queue(costs,
                 [&](size_t i, Workspace& workspace) { update(jobs[i], correct_bias, normalize_grads, workspace); });
  return true;
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cpp, m) {
  m.def(
      "adam_update_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
      "Tensor(d!) counts, Tensor hyper, bool correct_bias, bool normalize_grads) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("adam_update_", TORCH_BOX(&lic_fast::adam_update_));
}
