// Divisive normalization across channels; the reference is lic_fast/reference/gdn.py. x is [B, C, S], or [B, S, C]
// where the channels are last; with v = x^2 (|x| where simplified) and the parameters' effective values beta, gamma:
//     norm = beta + gamma v;  y = x norm^-1/2            (inverse: x norm^1/2; simplified: x / norm, x norm)
//     d_norm = dy x (derivative of the factor);  d_x = dy factor + v'(x) gamma^T d_norm
//     d_gamma = sum over positions of d_norm v^T;  d_beta = sum of d_norm
// The positions (b, s) are cut into tiles of all channels that stay in L2 with packed gamma: x is read once and y
// written once, in one pass; forward does 2 C operations an element in gemm.h's register tiles, backward 4 C (6 C where
// the factor was not kept). Tiles of [S, C] are transposed on their way in and out.
// A sum over positions is taken tile by tile within a group of tiles, one thread a group, then over the groups in
// their order. Tiles and groups depend on shapes alone, so that no bit depends on the number of threads.
#include "cpu/channel_tiles.h"
#include "cpu/gdn_loops.h"
#include "cpu/parallel.h"

namespace lic_fast {
namespace {

using gemm_detail::divide_up;

constexpr int64_t kGroups = 64, kGroupColumns = 256;
constexpr double kThreadWork = 1 << 18;  // multiply-adds that are worth another thread

struct Form {
  bool inverse, simplified;
  double beta_bound, gamma_bound, pedestal;

  FactorKind kind() const {
    if (simplified) return inverse ? kIdentity : kReciprocal;
    return inverse ? kSqrt : kRsqrt;
  }
};

int64_t grain(int64_t channels, int64_t columns) {
  return std::max<int64_t>(1, static_cast<int64_t>(kThreadWork / (static_cast<double>(channels) * channels * columns)));
}

// ---- parameters

template <class Acc>
struct Parameters {
  const Acc* beta;         // effective values, [C]
  const Acc* packed;       // gamma, or null
  const Acc* packed_back;  // its transpose, or null
};

template <class Acc>
void effective(const Acc* stored, int64_t n, double bound, double pedestal, Acc* to) {
  const Acc low = static_cast<Acc>(bound), offset = static_cast<Acc>(pedestal);
  for (int64_t i = 0; i < n; ++i) {
    const Acc bounded = stored[i] < low ? low : stored[i];  // NaN stays
    to[i] = bounded * bounded - offset;
  }
}

template <class Acc>
Parameters<Acc> prepare(const Tensor& beta, const Tensor& gamma, const Form& form, bool norm, bool back) {
  const GemmKernels<Acc>& use = gemm_kernels<Acc>();
  Workspace& workspace = scratch();
  const int64_t C = beta.numel(), packed = divide_up(C, use.rows) * use.rows * C;
  Acc* shift = workspace.get<Acc>(kBeta, C);
  Acc* mix = workspace.get<Acc>(kGamma, C * C);
  effective(static_cast<const Acc*>(beta.const_data_ptr()), C, form.beta_bound, form.pedestal, shift);
  effective(static_cast<const Acc*>(gamma.const_data_ptr()), C * C, form.gamma_bound, form.pedestal, mix);
  Parameters<Acc> result{shift, nullptr, nullptr};
  if (norm) {
    Acc* to = workspace.get<Acc>(kPacked, packed);
    use.pack_a(mix, C, 1, C, C, to);
    result.packed = to;
  }
  if (back) {
    Acc* to = workspace.get<Acc>(kPackedBack, packed);
    use.pack_a(mix, 1, C, C, C, to);
    result.packed_back = to;
  }
  return result;
}

// The gradient of a stored parameter: below its bound only what moves it towards the bound passes.
template <class Acc>
Acc stored_gradient(Acc grad, Acc stored, Acc bound) {
  grad *= Acc(2) * (stored < bound ? bound : stored);
  return grad * static_cast<Acc>(stored >= bound || grad < 0);
}

// ---- products

// The factor of a tile from its magnitudes (in `squares`); x, where given, is multiplied by it. watch(i, m, j, n) is
// called as the product comes to those rows and columns.
template <class Acc, class Watch>
void factor_of(const Tile& tile, const Parameters<Acc>& parameters, const Acc* squares, Acc* factor, Acc* x,
               const Watch& watch) {
  multiply(tile.rows, tile.rows, parameters.packed, squares, tile.step, tile.columns,
           [&](int64_t i, int64_t m, int64_t j, int64_t n, const Acc* sum, int64_t sum_step) {
             watch(i, m, j, n);
             const Tile part{m, n, tile.step, tile.f64, tile.kind};
             const int64_t at = i * tile.step + j;
             to_factor(part, sum, sum_step, parameters.beta + i, factor + at, x ? x + at : nullptr);
           });
}

// d_gamma [C, C] = or += d_norm v^T over the columns of a tile.
template <class Acc>
void add_outer(const Tile& tile, const Acc* d_norm, const Acc* x, Acc* packed_a, bool first, Acc* d_gamma) {
  const GemmKernels<Acc>& use = gemm_kernels<Acc>();
  const int64_t C = tile.rows, n = tile.columns, panel = 3 * use.lanes;
  Acc* packed_b = scratch().get<Acc>(Workspace::kPackedB, n * panel);
  use.pack_a(d_norm, tile.step, 1, C, n, packed_a);
  const Tile whole{1, n * panel, 0, tile.f64, tile.kind};
  for (int64_t j = 0; j < C; j += panel) {
    const int64_t columns = std::min(panel, C - j);
    use.pack_b(x + j * tile.step, tile.step, 1, columns, n, packed_b);
    magnitudes(whole, packed_b, packed_b);
    for (int64_t i = 0; i < C; i += use.rows) {
      use.tile[(columns - 1) / use.lanes](n, packed_a + i * n, use.rows, packed_b, panel, Acc(1),
                                          first ? Acc(0) : Acc(1), d_gamma + i * C + j, C, std::min(use.rows, C - i),
                                          columns);
    }
  }
}

// ---- forward

template <class T, class Acc>
void forward(const Layout& layout, const Form& form, const Tensor& x, const Tensor& beta, const Tensor& gamma,
             const Tensor& y, const Tensor& factor) {
  const int64_t C = layout.channels, N = layout.columns(), step = tile_step<Acc>(C);
  const Parameters<Acc> parameters = prepare<Acc>(beta, gamma, form, true, false);
  const T* from = static_cast<const T*>(x.const_data_ptr());
  T* to = static_cast<T*>(y.mutable_data_ptr());
  T* kept = factor.numel() ? static_cast<T*>(factor.mutable_data_ptr()) : nullptr;
  torch::stable::parallel_for(0, divide_up(N, step), grain(C, step), [&](int64_t begin, int64_t end) {
    Acc* values = scratch().get<Acc>(kX, C * step);
    Acc* squares = scratch().get<Acc>(kNorm, C * step);
    Acc* factors = scratch().get<Acc>(kFactor, C * step);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t * step, n = std::min(step, N - first);
      const Tile tile{C, n, step, sizeof(Acc) == 8, form.kind()};
      gather(layout, from, first, n, values, step);
      magnitudes(tile, values, squares);
      factor_of(tile, parameters, squares, factors, values, [&](int64_t i, int64_t m, int64_t j, int64_t width) {
        ahead<true>(layout, to, first + j, width, i, m);
        ahead<true>(layout, kept, first + j, width, i, m);
        if (t + 1 < end) ahead<false>(layout, from, first + step + j, width, i, m);
      });
      scatter(layout, values, step, first, n, to);
      if (kept) scatter(layout, factors, step, first, n, kept);
    }
  });
}

// ---- backward

template <class T, class Acc>
struct Backward {
  Layout layout;
  Form form;
  int64_t step;
  Parameters<Acc> parameters;
  const T *grad, *x, *factor;  // factor: null where it was not kept
  T* d_x;                      // null where not wanted
  bool want_gamma;

  // One tile: d_x is written, d_gamma [C, C] = or += (first or not), d_beta [C] +=.
  void run(int64_t begin, int64_t n, bool first, Acc* d_gamma, Acc* d_beta) const {
    const int64_t C = layout.channels;
    Workspace& workspace = scratch();
    Acc* values = workspace.get<Acc>(kX, C * step);
    Acc* grads = workspace.get<Acc>(kGrad, C * step);
    Acc* d_norm = workspace.get<Acc>(kNorm, C * step);
    // the factor, and once d_norm is known, d_norm packed
    Acc* factors =
        workspace.get<Acc>(kFactor, divide_up(C, gemm_kernels<Acc>().rows) * gemm_kernels<Acc>().rows * step);
    const Tile tile{C, n, step, sizeof(Acc) == 8, form.kind()};
    gather(layout, x, begin, n, values, step);
    if (factor) {
      gather(layout, factor, begin, n, factors, step);
    } else {
      magnitudes(tile, values, d_norm);
      factor_of<Acc>(tile, parameters, d_norm, factors, nullptr, [](int64_t, int64_t, int64_t, int64_t) {});
    }
    gather(layout, grad, begin, n, grads, step);
    norm_gradients(tile, grads, values, factors, d_norm, d_beta);
    if (want_gamma) add_outer(tile, d_norm, values, factors, first, d_gamma);
    if (!d_x) return;
    multiply(C, C, parameters.packed_back, d_norm, step, n,
             [&](int64_t i, int64_t m, int64_t j, int64_t width, const Acc* sum, int64_t sum_step) {
               for (const T* next : {grad, x, factor}) ahead<false>(layout, next, begin + step + j, width, i, m);
               ahead<true>(layout, d_x, begin + j, width, i, m);
               const Tile part{m, width, step, tile.f64, tile.kind};
               add_through(part, sum, sum_step, values + i * step + j, grads + i * step + j);
             });
    scatter(layout, grads, step, begin, n, d_x);
  }
};

// How many tiles one group sums: enough that its partial sums cost little, and that all groups' take little memory.
int64_t group_tiles(int64_t tiles, int64_t step, int64_t channels, int64_t columns, int64_t size) {
  const int64_t most_bytes = std::max<int64_t>(4 << 20, channels * columns * size / 8);
  const int64_t fit = std::clamp<int64_t>(most_bytes / (channels * channels * size), 1, kGroups);
  return std::max({divide_up(tiles, fit), divide_up(kGroupColumns, step), int64_t(1)});
}

template <class Acc>
void finish_gradient(const Acc* partial, int64_t groups, int64_t group_step, int64_t n, const Tensor& stored,
                     double bound, const Tensor& to) {
  const Acc* value = static_cast<const Acc*>(stored.const_data_ptr());
  Acc* out = static_cast<Acc*>(to.mutable_data_ptr());
  torch::stable::parallel_for(0, n, 1 << 14, [&](int64_t begin, int64_t end) {
    if (groups == 0) std::fill(out + begin, out + end, Acc(0));
    for (int64_t g = 0; g < groups; ++g) {
      const Acc* from = partial + g * group_step;
      if (g == 0) {
        std::copy(from + begin, from + end, out + begin);
      } else {
        for (int64_t i = begin; i < end; ++i) out[i] += from[i];
      }
    }
    for (int64_t i = begin; i < end; ++i) out[i] = stored_gradient(out[i], value[i], static_cast<Acc>(bound));
  });
}

template <class T, class Acc>
void backward(const Layout& layout, const Form& form, const Tensor& grad, const Tensor& x, const Tensor& factor,
              const Tensor& beta, const Tensor& gamma, const Tensor& d_x, const Tensor& d_beta, const Tensor& d_gamma) {
  const int64_t C = layout.channels, N = layout.columns(), step = tile_step<Acc>(C), tiles = divide_up(N, step);
  const bool kept = factor.numel() > 0, want_x = d_x.numel() > 0, want_gamma = d_gamma.numel() > 0;
  const Backward<T, Acc> pass{layout,
                              form,
                              step,
                              prepare<Acc>(beta, gamma, form, !kept, want_x),
                              static_cast<const T*>(grad.const_data_ptr()),
                              static_cast<const T*>(x.const_data_ptr()),
                              kept ? static_cast<const T*>(factor.const_data_ptr()) : nullptr,
                              want_x ? static_cast<T*>(d_x.mutable_data_ptr()) : nullptr,
                              want_gamma};
  const int64_t each = group_tiles(tiles, step, C, N, sizeof(Acc)), groups = divide_up(tiles, each);
  const int64_t group_step = (want_gamma ? C * C : 0) + C;
  const std::unique_ptr<Acc[]> partial(new Acc[groups * group_step]);
  torch::stable::parallel_for(0, groups, grain(C, 2 * step * each), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      Acc* sums = partial.get() + g * group_step;
      std::fill_n(sums, C, Acc(0));
      for (int64_t t = g * each; t < std::min(tiles, (g + 1) * each); ++t) {
        pass.run(t * step, std::min(step, N - t * step), t == g * each, sums + C, sums);
      }
    }
  });
  if (d_beta.numel()) finish_gradient<Acc>(partial.get(), groups, group_step, C, beta, form.beta_bound, d_beta);
  if (want_gamma) {
    finish_gradient<Acc>(partial.get() + C, groups, group_step, C * C, gamma, form.gamma_bound, d_gamma);
  }
}

Layout layout_of(const Tensor& x, const Tensor& beta, bool last) {
  const int64_t batch = x.size(0), C = beta.numel();
  return dense(batch, C, batch && C ? x.numel() / (batch * C) : 0, last);
}

void check(const Tensor& x, std::initializer_list<const Tensor*> likes) {
  STD_TORCH_CHECK(x.is_contiguous(), "lic_fast: gdn takes contiguous tensors");
  for (const Tensor* t : likes) {
    if (t->numel()) check_same_numel(x, *t);
    STD_TORCH_CHECK(t->is_contiguous() && dtype_code(*t) == dtype_code(x), "lic_fast: gdn takes tensors alike");
  }
}

void gdn_out(Tensor x, Tensor beta, Tensor gamma, bool inverse, bool simplified, double beta_bound, double gamma_bound,
             double pedestal, bool last, Tensor y, Tensor factor) {
  check(x, {&y, &factor});
  const Form form{inverse, simplified, beta_bound, gamma_bound, pedestal};
  const Layout layout = layout_of(x, beta, last);
  if (layout.columns() == 0) return;
  switch (dtype_code(x)) {
    case kFloat32: return forward<float, float>(layout, form, x, beta, gamma, y, factor);
    case kBFloat16: return forward<BFloat16, float>(layout, form, x, beta, gamma, y, factor);
    case kFloat64: return forward<double, double>(layout, form, x, beta, gamma, y, factor);
    default: STD_TORCH_CHECK(false, "lic_fast: gdn takes float32, bfloat16 and float64");
  }
}

void gdn_bwd_out(Tensor grad, Tensor x, Tensor factor, Tensor beta, Tensor gamma, bool inverse, bool simplified,
                 double beta_bound, double gamma_bound, double pedestal, bool last, Tensor d_x, Tensor d_beta,
                 Tensor d_gamma) {
  check(x, {&grad, &factor, &d_x});
  const Form form{inverse, simplified, beta_bound, gamma_bound, pedestal};
  const Layout layout = layout_of(x, beta, last);
  if (layout.channels == 0) return;  // no gradient has elements; without columns they are zero
  switch (dtype_code(x)) {
    case kFloat32: return backward<float, float>(layout, form, grad, x, factor, beta, gamma, d_x, d_beta, d_gamma);
    case kBFloat16: return backward<BFloat16, float>(layout, form, grad, x, factor, beta, gamma, d_x, d_beta, d_gamma);
    case kFloat64: return backward<double, double>(layout, form, grad, x, factor, beta, gamma, d_x, d_beta, d_gamma);
    default: STD_TORCH_CHECK(false, "lic_fast: gdn takes float32, bfloat16 and float64");
  }
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cpp, m) {
  m.def(
      "gdn_out(Tensor x, Tensor beta, Tensor gamma, bool inverse, bool simplified, float beta_bound, "
      "float gamma_bound, float pedestal, bool channels_last, Tensor(a!) y, Tensor(b!) factor) -> ()");
  m.def(
      "gdn_bwd_out(Tensor grad, Tensor x, Tensor factor, Tensor beta, Tensor gamma, bool inverse, bool simplified, "
      "float beta_bound, float gamma_bound, float pedestal, bool channels_last, Tensor(a!) d_x, Tensor(b!) d_beta, "
      "Tensor(c!) d_gamma) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("gdn_out", TORCH_BOX(&lic_fast::gdn_out));
  m.impl("gdn_bwd_out", TORCH_BOX(&lic_fast::gdn_bwd_out));
}
