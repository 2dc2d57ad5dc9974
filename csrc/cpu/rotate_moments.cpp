// Adam's moments carried to the next eigenbasis; the reference is lic_fast/reference/rotate_moments.py:
//     m <- m x_a rotation_a^T on every axis a that has a rotation;  v <- v[order_1, ..., order_k]
// Threads take whole tensors. m goes through the products of a projection (planes.h) and back into its place; v is
// gathered row by row into scratch, then copied back.
#include "cpu/planes.h"

namespace lic_fast {
namespace {

struct Job {
  Planes planes;
  void *m, *v;
  std::vector<const int64_t*> order;  // of every axis, or null
  bool f64;
};

template <class T>
void rotate(const Job& job, Workspace& workspace) {
  const Planes& planes = job.planes;
  const int64_t n = planes.numel();
  T* m = static_cast<T*>(job.m);
  Pair<T> data{m, workspace.get<T>(kPlanesSlot, n)};
  if (mixes_taps(planes)) tap_pass<T>(planes, data.now, data.now, nullptr, false, workspace);
  project_rows(planes, data, false, workspace);
  if (planes.column_axis().basis) project_columns(planes, data, false, NoWatcher(), workspace);
  if (data.now != m) std::copy_n(data.now, n, m);
}

// The old tap of each new one, through the orders of the tap axes.
std::vector<int64_t> tap_order(const Job& job) {
  std::vector<int64_t> places{0};
  for (size_t a = 0; a < job.planes.tap_axes(); ++a) {
    const int64_t size = job.planes.axes[a].size;
    std::vector<int64_t> next;
    for (const int64_t place : places) {
      for (int64_t i = 0; i < size; ++i) next.push_back(place * size + (job.order[a] ? job.order[a][i] : i));
    }
    places.swap(next);
  }
  return places;
}

template <class T>
void reorder(const Job& job, Workspace& workspace) {
  if (std::all_of(job.order.begin(), job.order.end(), [](const int64_t* order) { return !order; })) return;
  const Planes& planes = job.planes;
  const int64_t R = planes.rows, C = planes.columns;
  const int64_t* rows = planes.axes.size() > 1 ? job.order[planes.axes.size() - 2] : nullptr;
  const int64_t* columns = job.order.back();
  const std::vector<int64_t> taps = tap_order(job);
  T* v = static_cast<T*>(job.v);
  T* sorted = workspace.get<T>(kPlanesSlot, planes.numel());
  for (int64_t t = 0; t < planes.taps; ++t) {
    for (int64_t r = 0; r < R; ++r) {
      const T* from = v + (taps[t] * R + (rows ? rows[r] : r)) * C;
      T* to = sorted + (t * R + r) * C;
      if (columns) {
        for (int64_t c = 0; c < C; ++c) to[c] = from[columns[c]];
      } else {
        std::copy_n(from, C, to);
      }
    }
  }
  std::copy_n(sorted, planes.numel(), v);
}

bool set_order(const Tensor& order, int64_t size, const int64_t** place) {
  if (order.numel() == 0) return true;
  if (!order.is_cpu() || order.scalar_type() != ScalarType::Long || order.dim() != 1 || order.size(0) != size ||
      !order.is_contiguous()) {
    return false;
  }
  *place = static_cast<const int64_t*>(order.const_data_ptr());
  return std::all_of(*place, *place + size, [=](int64_t i) { return i >= 0 && i < size; });
}

bool add_job(const Tensor& m, const Tensor& v, const Tensor* rotation, const Tensor* order, std::vector<Job>& jobs) {
  const int64_t axes = m.dim();
  const int32_t code = dtype_code(m);
  if (axes < 1 || axes > 5 || m.numel() == 0 || (code != kFloat32 && code != kFloat64)) return false;
  if (dtype_code(v) != code || !m.is_cpu() || !v.is_cpu() || !same_shape(m, v)) return false;
  if (!m.is_contiguous() || !v.is_contiguous()) return false;
  Job job;
  job.f64 = code == kFloat64;
  job.m = m.mutable_data_ptr();
  job.v = v.mutable_data_ptr();
  job.order.resize(axes, nullptr);
  for (int64_t a = 0; a < axes; ++a) {
    job.planes.add_axis(m.size(a));
    if (!set_order(order[a], m.size(a), &job.order[a])) return false;
    if (rotation[a].numel() == 0) continue;
    if (!is_square(rotation[a], m.size(a), code)) return false;
    job.planes.axes.back().basis = rotation[a].const_data_ptr();
  }
  jobs.push_back(std::move(job));
  return true;
}

// Returns false, having written nothing, where the lists are not what the header says.
bool rotate_moments_(std::vector<Tensor> exp_avg, std::vector<Tensor> exp_avg_sq, std::vector<Tensor> rotation,
                     std::vector<Tensor> order) {
  if (exp_avg.size() != exp_avg_sq.size() || rotation.size() != order.size()) return false;
  std::vector<Job> jobs;
  std::vector<double> costs;
  size_t first = 0;
  for (size_t i = 0; i < exp_avg.size(); ++i) {
    const size_t axes = static_cast<size_t>(exp_avg[i].dim());
    if (first + axes > rotation.size()) return false;
    if (!add_job(exp_avg[i], exp_avg_sq[i], rotation.data() + first, order.data() + first, jobs)) return false;
    costs.push_back(jobs.back().planes.cost());
    first += axes;
  }
  if (first != rotation.size()) return false;
  parallel_queue(costs, [&](size_t i, Workspace& workspace) {
    if (jobs[i].f64) {
      rotate<double>(jobs[i], workspace);
      reorder<double>(jobs[i], workspace);
    } else {
      rotate<float>(jobs[i], workspace);
      reorder<float>(jobs[i], workspace);
    }
  });
  return true;
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cpp, m) {
  m.def("rotate_moments_(Tensor(a!)[] exp_avg, Tensor(b!)[] exp_avg_sq, Tensor[] rotation, Tensor[] order) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("rotate_moments_", TORCH_BOX(&lic_fast::rotate_moments_));
}
