// A step of SOAP over a list of tensors, on the CPU; the reference is lic_fast/reference/soap_update.py. For one tensor
// G of axes a with eigenbases Q_a and Shampoo factors GG_a:
//     GG_a <- b GG_a + (1 - b) (Gram matrix of G's axis a)
//     P = G x_a Q_a^T;  m <- b1 m + (1 - b1) P;  v <- b2 v + (1 - b2) P^2;  U = (m / (sqrt(v) + eps)) x_a Q_a
//     p <- (p - step_size U) (1 - lr wd)
// Schedule: threads take whole tensors, the costliest first. The gradient is gathered once into planes [taps, R, C]
// (planes.h), and everything stays in caches from there to the parameter: one pass over the planes for the tap axes
// (Gram matrices and mixing), the products of rows and columns (gemm.h; symmetric ones half), Adam on blocks of rows of
// the last product while they are in L2 (m and v are read ahead tile by tile, and written once), the same products
// back, and one pass that writes the parameter through its strides. Memory: 3 copies of the largest tensor a thread.
#include "cpu/strided_view.h"

namespace lic_fast {
namespace {

struct Job {
  Planes planes;
  View param, grad;
  void *m, *v;
  int64_t* counts;
  Hyper h;
  bool f64;
};

constexpr int kGramSlot = kPlanesSlot + 2;

struct Options {
  bool correct_bias, normalize_grads;
};

// x <- m / (sqrt(v) + eps) after both averages have moved towards x and its square.
template <class T>
LIC_FAST_INLINE void adam_of(void* x_ptr, void* m_ptr, void* v_ptr, int64_t n, const Hyper& h) {
  T* __restrict__ x = static_cast<T*>(x_ptr);
  T* __restrict__ m = static_cast<T*>(m_ptr);
  T* __restrict__ v = static_cast<T*>(v_ptr);
  const T b1 = static_cast<T>(h.beta1), c1 = static_cast<T>(1.0 - h.beta1), eps = static_cast<T>(h.eps);
  const T b2 = static_cast<T>(h.beta2), c2 = static_cast<T>(1.0 - h.beta2);
  for (int64_t i = 0; i < n; ++i) {
    const T mean = m[i] * b1 + c1 * x[i], square = v[i] * b2 + c2 * (x[i] * x[i]);
    m[i] = mean;
    v[i] = square;
    x[i] = mean / (std::sqrt(square) + eps);
  }
}

template <class Isa>
LIC_FAST_INLINE void run_adam_body(void* x, void* m, void* v, int64_t n, const Hyper& h, bool f64) {
  if (f64) {
    adam_of<double>(x, m, v, n, h);
  } else {
    adam_of<float>(x, m, v, n, h);
  }
}

LIC_FAST_SIMD_VARIANTS(run_adam, (void* x, void* m, void* v, int64_t n, const Hyper& h, bool f64),
                       (x, m, v, n, h, f64));

// factor [n, n] <- factor + weight (x^T x - factor), for a single row x: one pass over the factor.
template <class T>
LIC_FAST_INLINE void rank_one_of(int64_t n, const T* __restrict__ x, double weight_in, T* factor) {
  const T weight = static_cast<T>(weight_in);
  for (int64_t i = 0; i < n; ++i) {
    T* __restrict__ row = factor + i * n;
    const T left = x[i];
    for (int64_t j = 0; j < n; ++j) row[j] += weight * (left * x[j] - row[j]);
  }
}

template <class Isa>
LIC_FAST_INLINE void run_rank_one_body(int64_t n, const void* x, double weight, void* factor, bool f64) {
  if (f64) {
    rank_one_of(n, static_cast<const double*>(x), weight, static_cast<double*>(factor));
  } else {
    rank_one_of(n, static_cast<const float*>(x), weight, static_cast<float*>(factor));
  }
}

LIC_FAST_SIMD_VARIANTS(run_rank_one, (int64_t n, const void* x, double weight, void* factor, bool f64),
                       (n, x, weight, factor, f64));

template <class T>
double root_mean_square(const T* x, int64_t n) {  // blocks of sums in fp64
  double total = 0;
  for (int64_t first = 0; first < n; first += 4096) {
    double sum[8] = {};
    const int64_t end = std::min(n, first + 4096), whole = end - (end - first) % 8;
    for (int64_t i = first; i < whole; i += 8) {
      for (int l = 0; l < 8; ++l) sum[l] += static_cast<double>(x[i + l]) * static_cast<double>(x[i + l]);
    }
    for (int64_t i = whole; i < end; ++i) sum[0] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    for (const double lane : sum) total += lane;
  }
  return std::sqrt(total / static_cast<double>(n));
}

// factor [n, n] <- factor + weight (sum - factor), both triangles from the lower one of sum.
template <class T>
LIC_FAST_INLINE void lerp_lower_of(int64_t n, double weight_in, const T* __restrict__ sum, T* __restrict__ factor) {
  const T weight = static_cast<T>(weight_in);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) factor[i * n + j] += weight * (sum[i * n + j] - factor[i * n + j]);
  }
}

template <class Isa>
LIC_FAST_INLINE void run_lerp_lower_body(int64_t n, double weight, const void* sum, void* factor, bool f64) {
  if (f64) {
    lerp_lower_of(n, weight, static_cast<const double*>(sum), static_cast<double*>(factor));
  } else {
    lerp_lower_of(n, weight, static_cast<const float*>(sum), static_cast<float*>(factor));
  }
}

LIC_FAST_SIMD_VARIANTS(run_lerp_lower, (int64_t n, double weight, const void* sum, void* factor, bool f64),
                       (n, weight, sum, factor, f64));

// The factors of rows and columns. The Gram matrix is summed by itself, in scratch: in the factor, which can be far
// larger than one tap's part of it, every partial sum would be rounded away.
template <class T>
void move_matrix_factors(const Job& job, const T* g, Workspace& workspace) {
  const Planes& planes = job.planes;
  const int64_t R = planes.rows, C = planes.columns;
  const double weight = 1.0 - job.h.shampoo_beta;
  T* sum = workspace.get<T>(kGramSlot, std::max(R * R, C * C));
  if (planes.row_axis() && planes.row_axis()->factor) {
    T* factor = static_cast<T*>(planes.row_axis()->factor);
    for (int64_t t = 0; t < planes.taps; ++t) {
      symmetric<T>(R, C, 1, g + t * planes.plane(), C, 1, t == 0 ? T(0) : T(1), sum, R, workspace);
    }
    run_lerp_lower(R, weight, sum, factor, job.f64);
    mirror(R, factor, R);
  }
  T* factor = static_cast<T*>(planes.column_axis().factor);
  if (!factor) return;
  if (planes.taps * R == 1) return run_rank_one(C, g, weight, factor, job.f64);
  symmetric<T>(C, planes.taps * R, 1, g, 1, C, 0, sum, C, workspace);
  run_lerp_lower(C, weight, sum, factor, job.f64);
  mirror(C, factor, C);
}

template <class T>
void move_tap_factors(const Job& job, const double* sums) {
  const double weight = 1.0 - job.h.shampoo_beta;
  for (size_t a = 0; a < job.planes.tap_axes(); ++a) {
    T* factor = static_cast<T*>(job.planes.axes[a].factor);
    if (!factor) continue;
    const int64_t d = job.planes.axes[a].size;
    for (int64_t i = 0; i < d; ++i) {
      for (int64_t j = 0; j < d; ++j) {
        const double old = static_cast<double>(factor[i * d + j]), sum = sums[i >= j ? i * d + j : j * d + i];
        factor[i * d + j] = static_cast<T>(old + weight * (sum - old));
      }
    }
    sums += d * d;
  }
}

// Adam on the last product of the projection, block by block.
template <class T>
struct AdamWatcher {
  const Job& job;
  T* out;

  void ahead(int64_t i, int64_t i_end, int64_t j, int64_t j_end) const {
    const int64_t C = job.planes.columns;
    for (; i < i_end; ++i) {
      for (int64_t at = i * C + j; at < i * C + j_end; at += 64 / static_cast<int64_t>(sizeof(T))) {
        __builtin_prefetch(static_cast<T*>(job.m) + at, 1, 2);
        __builtin_prefetch(static_cast<T*>(job.v) + at, 1, 2);
      }
    }
  }
  void finished(int64_t i, int64_t i_end, int64_t j, int64_t j_end) const {
    const int64_t C = job.planes.columns;
    if (j == 0 && j_end == C) return adam(i * C, (i_end - i) * C);
    for (; i < i_end; ++i) adam(i * C + j, j_end - j);
  }
  void adam(int64_t at, int64_t n) const {
    run_adam(out + at, static_cast<T*>(job.m) + at, static_cast<T*>(job.v) + at, n, job.h, job.f64);
  }
};

// The update of a tensor from its gathered gradient (data.now); it ends in data.now.
template <class T>
void find_update(const Job& job, Pair<T>& data, Workspace& workspace) {
  const Planes& planes = job.planes;
  const bool mixed = mixes_taps(planes);
  const int64_t sums_count = gram_sums(planes);
  std::vector<double> sums(sums_count);
  move_matrix_factors(job, data.now, workspace);
  if (mixed || sums_count) {
    tap_pass(planes, data.now, mixed ? data.other : nullptr, sums_count ? sums.data() : nullptr, false, workspace);
    move_tap_factors<T>(job, sums.data());
    if (mixed) data.swap();
  }
  project_rows(planes, data, false, workspace);
  const AdamWatcher<T> adam{job, planes.column_axis().basis ? data.other : data.now};
  project_columns(planes, data, false, adam, workspace);
  project_columns(planes, data, true, NoWatcher(), workspace);
  project_rows(planes, data, true, workspace);
  if (mixed) tap_pass<T>(planes, data.now, data.now, nullptr, true, workspace);
}

template <class T>
void update(const Job& job, const Options& options, Workspace& workspace) {
  const int64_t n = job.planes.numel();
  Pair<T> data{workspace.get<T>(kPlanesSlot, n), workspace.get<T>(kPlanesSlot + 1, n)};
  bool finite = false;
  run_gather(job.grad, job.planes, data.now, job.f64, &finite);
  job.counts[finite ? 0 : 1] += 1;
  if (!finite) return;
  find_update(job, data, workspace);
  Apply how{step_size(job.h, job.counts[0], options.correct_bias), job.h.lr * job.h.weight_decay};
  if (options.normalize_grads) how.step /= 1e-30 + root_mean_square(data.now, n);
  run_apply(job.param, job.planes, data.now, how, job.f64);
}

bool set_matrix(const Tensor& matrix, int64_t size, int32_t code, bool writable, const void** place) {
  if (matrix.numel() == 0) return true;
  if (!is_square(matrix, size, code)) return false;
  *place = writable ? matrix.mutable_data_ptr() : matrix.const_data_ptr();
  return true;
}

bool add_job(const Tensor& param, const Tensor& grad, const Tensor& m, const Tensor& v, const Tensor* GG,
             const Tensor* Q, std::vector<Job>& jobs) {
  const int64_t axes = param.dim();
  if (axes < 1 || axes > 5 || param.numel() == 0 || !dtypes_fit(param, grad, m, v)) return false;
  if (!param.is_cpu() || !grad.is_cpu() || !m.is_cpu() || !v.is_cpu()) return false;
  if (!same_shape(param, grad) || !same_shape(param, m) || !same_shape(param, v)) return false;
  if (!m.is_contiguous() || !v.is_contiguous() || !apart(param)) return false;
  Job job;
  const int32_t code = dtype_code(m);
  job.f64 = code == kFloat64;
  for (int64_t a = 0; a < axes; ++a) {
    job.planes.add_axis(param.size(a));
    Axis& axis = job.planes.axes.back();
    const void* factor = nullptr;
    if (!set_matrix(Q[a], axis.size, code, false, &axis.basis)) return false;
    if (!set_matrix(GG[a], axis.size, code, true, &factor)) return false;
    axis.factor = const_cast<void*>(factor);
  }
  job.param = make_view(param, true);
  job.grad = make_view(grad, false);
  job.m = m.mutable_data_ptr();
  job.v = v.mutable_data_ptr();
  jobs.push_back(std::move(job));
  return true;
}

// Returns false, having written nothing, where the lists are not what the header says.
bool soap_update_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avg,
                  std::vector<Tensor> exp_avg_sq, std::vector<Tensor> GG, std::vector<Tensor> Q, Tensor counts,
                  Tensor hyper, bool correct_bias, bool normalize_grads, std::string) {
  const size_t n = params.size();
  if (grads.size() != n || exp_avg.size() != n || exp_avg_sq.size() != n || GG.size() != Q.size()) return false;
  if (!are_tables(counts, hyper, n)) return false;
  std::vector<Job> jobs;
  std::vector<double> costs;
  jobs.reserve(n);
  size_t first = 0;
  for (size_t i = 0; i < n; ++i) {
    const size_t axes = static_cast<size_t>(params[i].dim());
    if (first + axes > GG.size()) return false;
    if (!add_job(params[i], grads[i], exp_avg[i], exp_avg_sq[i], GG.data() + first, Q.data() + first, jobs))
      return false;
    jobs.back().counts = static_cast<int64_t*>(counts.mutable_data_ptr()) + 2 * i;
    jobs.back().h = hyper_row(hyper, i);
    costs.push_back(jobs.back().planes.cost());
    first += axes;
  }
  if (first != GG.size()) return false;
  const Options options{correct_bias, normalize_grads};
  parallel_queue(costs, [&](size_t i, Workspace& workspace) {
    if (jobs[i].f64) {
      update<double>(jobs[i], options, workspace);
    } else {
      update<float>(jobs[i], options, workspace);
    }
  });
  return true;
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cpp, m) {
  m.def(
      "soap_update_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
      "Tensor(d!)[] GG, Tensor[] Q, Tensor(e!) counts, Tensor hyper, bool correct_bias, bool normalize_grads, "
      "str precision) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("soap_update_", TORCH_BOX(&lic_fast::soap_update_));
}
