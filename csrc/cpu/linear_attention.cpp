// Keys and values summed over the places, v softmax(k)^T, and the gradients; the reference is
// lic_fast/reference/linear_attention.py. k [B, K, N] and v [B, V, N] have any strides with dense channels or places.
//
// Forward: a piece of an image's places goes tile by tile: maximum and sum of each channel of k, exp(k - maximum) as
// rows [places, K], and their product with the rows of v into [V, K], which is multiplied by exp(old - new maximum)
// where one has moved. The pieces are put together in their order. Backward: tiles [channels, places], two products
// with the gradient, whose order of sums is that of channels. Pieces and tiles depend on shapes alone, so that no bit
// depends on the number of threads. Whatever passes by is read once; the softmax is never in memory.
#include "cpu/channel_tiles.h"
#include "cpu/linear_attention_loops.h"
#include "cpu/parallel.h"

namespace lic_fast {
namespace {

using gemm_detail::divide_up;

constexpr int64_t kPlaces = 128;                          // of a tile, forward
constexpr int64_t kPiecePlaces = 1024, kMostPieces = 64;  // of an image; of all images
constexpr int64_t kPiecesBytes = 64 << 20;                // of all pieces' sums, where there is more than one an image
constexpr double kThreadWork = 1 << 18;                   // multiply-adds that are worth another thread

int64_t lanes_up(int64_t n) { return divide_up(n, 16) * 16; }  // whole vectors of any instruction set

int64_t grain(const Layout& k, const Layout& v, int64_t places) {
  const double work = static_cast<double>(k.channels) * v.channels * places;
  return std::max<int64_t>(1, static_cast<int64_t>(kThreadWork / std::max(work, 1.0)));
}

// ---- forward

// What one piece of an image comes to: sums [V, width], then maximum [width] and sum [width] of each channel of k.
struct Pieces {
  int64_t count, places, width, size;  // of an image; of a piece; of a row; numbers of one piece

  Pieces(const Layout& k, const Layout& v, int64_t bytes) {  // bytes: of a number
    width = lanes_up(k.channels);
    size = (v.channels + 2) * width;
    const int64_t most = std::min(kMostPieces, kPiecesBytes / (size * bytes)) / std::max<int64_t>(1, k.batch);
    const int64_t wanted = std::clamp<int64_t>(k.positions / kPiecePlaces, 1, std::max<int64_t>(1, most));
    places = divide_up(divide_up(k.positions, wanted), kPlaces) * kPlaces;
    count = divide_up(k.positions, places);
  }
};

// Places [first, first + n) of an image as rows [n, *step] in the arithmetic's dtype; where they lie, if that can be
// read in whole blocks of `block` channels.
template <class T, class Acc>
const Acc* rows_of(const Layout& layout, const T* from, int64_t image, int64_t first, int64_t n, int64_t block,
                   Slot slot, int64_t* step) {
  const int64_t C = layout.channels, at = image * layout.image + first * (layout.last ? layout.step : 1);
  if constexpr (std::is_same_v<T, Acc>) {
    if (layout.last && C % block == 0) {
      *step = layout.step;
      return from + at;
    }
  }
  *step = lanes_up(C);
  Acc* rows = scratch().get<Acc>(slot, kPlaces * *step);
  if (layout.last) {
    to_rows(from + at, layout.step, n, C, rows, *step);
  } else if constexpr (std::is_same_v<T, Acc>) {
    gemm_kernels<Acc>().transpose(from + at, layout.step, C, n, rows, *step);
  } else {
    Acc* planes = scratch().get<Acc>(kRows, C * n);
    to_rows(from + at, layout.step, C, n, planes, n);
    gemm_kernels<Acc>().transpose(planes, n, C, n, rows, *step);
  }
  for (int64_t r = 0; r < n; ++r) std::fill(rows + r * *step + C, rows + (r + 1) * *step, Acc(0));
  return rows;
}

// sums [V, width] = or += the rows of v, transposed, times the shares [n, width].
template <class Acc>
void add_products(int64_t n, int64_t V, const Acc* values, int64_t value_step, const Acc* shares, int64_t width,
                  bool first, Acc* sums) {
  const GemmKernels<Acc>& use = gemm_kernels<Acc>();
  const int64_t across = divide_up(width, 3 * use.lanes), panel = divide_up(width / use.lanes, across) * use.lanes;
  const int64_t down = divide_up(V, use.rows);
  for (int64_t j = 0; j < across; ++j) {
    const int64_t columns = std::min(panel, width - j * panel);
    for (int64_t i = 0; i < down; ++i) {
      use.tile[(columns - 1) / use.lanes](n, values + i * use.rows, value_step, shares + j * panel, width, Acc(1),
                                          first ? Acc(0) : Acc(1), sums + i * use.rows * width + j * panel, width,
                                          std::min(use.rows, V - i * use.rows), columns);
    }
  }
}

template <class T, class Acc>
void run_piece(const Layout& k, const Layout& v, const T* keys, const T* values, const Pieces& p, int64_t image,
               int64_t begin, Acc* sums) {
  const int64_t V = v.channels, end = std::min(begin + p.places, k.positions);
  Acc *maximum = sums + V * p.width, *total = maximum + p.width;
  std::fill_n(maximum, p.width, static_cast<Acc>(-HUGE_VAL));
  std::fill_n(total, p.width, Acc(0));
  Acc* shares = scratch().get<Acc>(kNorm, kPlaces * p.width);
  Acc* old = scratch().get<Acc>(kFactor, p.width);
  for (int64_t first = begin; first < end; first += kPlaces) {
    const int64_t n = std::min(kPlaces, end - first);
    int64_t key_step, value_step;
    const Acc* key_rows = rows_of<T, Acc>(k, keys, image, first, n, 16, kX, &key_step);
    const Acc* value_rows = rows_of<T, Acc>(v, values, image, first, n, gemm_kernels<Acc>().rows, kGrad, &value_step);
    bool moved;
    soften({key_rows, key_step, n, p.width, shares, maximum, total, old, sizeof(Acc) == 8}, &moved);
    if (moved && first > begin) rescale(sums, V, p.width, old, sizeof(Acc) == 8);
    add_products(n, V, value_rows, value_step, shares, p.width, first == begin, sums);
  }
}

// The context [V, K] and the statistics [2, K] of an image's pieces: what was taken from exponents, and the sum.
template <class Acc>
void put_together(const Layout& k, const Layout& v, const Pieces& p, const Acc* pieces, Acc* context, Acc* statistics) {
  const int64_t K = k.channels, V = v.channels;
  const std::unique_ptr<Acc[]> weights(new Acc[p.count * p.width]);
  for (int64_t j = 0; j < K; ++j) {
    const auto maximum = [&](int64_t piece) { return pieces[piece * p.size + V * p.width + j]; };
    Acc top = static_cast<Acc>(-HUGE_VAL);
    double sum = 0;
    for (int64_t g = 0; g < p.count; ++g) top = std::max(top, maximum(g));
    const Acc finite = top == static_cast<Acc>(-HUGE_VAL) ? Acc(0) : top;
    for (int64_t g = 0; g < p.count; ++g) {
      weights[g * p.width + j] = std::exp(maximum(g) - finite);
      sum += static_cast<double>(weights[g * p.width + j]) * pieces[g * p.size + (V + 1) * p.width + j];
    }
    for (int64_t g = 0; g < p.count; ++g) weights[g * p.width + j] /= static_cast<Acc>(sum);
    statistics[j] = finite;
    statistics[K + j] = static_cast<Acc>(sum);
  }
  for (int64_t i = 0; i < V; ++i) {
    std::fill_n(context + i * K, K, Acc(0));
    for (int64_t g = 0; g < p.count; ++g) {
      const Acc* __restrict__ from = pieces + g * p.size + i * p.width;
      const Acc* __restrict__ weight = weights.get() + g * p.width;
      Acc* __restrict__ to = context + i * K;
      for (int64_t j = 0; j < K; ++j) to[j] += from[j] * weight[j];
    }
  }
}

template <class T, class Acc>
void forward(const Layout& k, const Layout& v, const Tensor& keys, const Tensor& values, const Tensor& context,
             const Tensor& statistics) {
  const int64_t K = k.channels, V = v.channels;
  Acc* to = static_cast<Acc*>(context.mutable_data_ptr());
  Acc* ends = static_cast<Acc*>(statistics.mutable_data_ptr());
  if (k.positions == 0) {
    std::fill_n(to, k.batch * V * K, Acc(0));
    std::fill_n(ends, k.batch * 2 * K, Acc(0));
    return;
  }
  const Pieces p(k, v, sizeof(Acc));
  const std::unique_ptr<Acc[]> pieces(new Acc[k.batch * p.count * p.size]);
  torch::stable::parallel_for(0, k.batch * p.count, grain(k, v, p.places), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      run_piece<T, Acc>(k, v, static_cast<const T*>(keys.const_data_ptr()),
                        static_cast<const T*>(values.const_data_ptr()), p, t / p.count, t % p.count * p.places,
                        pieces.get() + t * p.size);
    }
  });
  torch::stable::parallel_for(0, k.batch, grain(k, v, p.count), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      put_together(k, v, p, pieces.get() + b * p.count * p.size, to + b * V * K, ends + b * 2 * K);
    }
  });
}

// ---- backward

template <class T, class Acc>
struct Backward {
  Layout k, v, d_k, d_v;
  int64_t step;
  const T *keys, *values;
  const Acc *inner, *statistics;          // of all images
  const Acc *packed, *packed_transposed;  // the gradient of one image
  T *to_k, *to_v;

  // Places [first, first + n) of an image.
  void run(int64_t image, int64_t first, int64_t n) const {
    const int64_t K = k.channels, V = v.channels, at = image * k.positions + first;
    Acc* shares = scratch().get<Acc>(kX, K * step);
    Acc* right = scratch().get<Acc>(kGrad, std::max(K, V) * step);
    Acc* out = scratch().get<Acc>(kNorm, std::max(K, V) * step);
    gather(k, keys, at, n, shares, step);
    const Acc* most = statistics + image * 2 * K;
    to_shares({shares, K, n, step, most, most + K, nullptr, 0, nullptr, sizeof(Acc) == 8});
    gather(v, values, at, n, right, step);
    multiply(K, V, packed_transposed, right, step, n,
             [&](int64_t i, int64_t m, int64_t j, int64_t width, const Acc* sum, int64_t sum_step) {
               through_softmax({shares + i * step + j, m, width, step, inner + image * K + i, nullptr, sum, sum_step,
                                out + i * step + j, sizeof(Acc) == 8});
             });
    scatter(d_k, out, step, at, n, to_k);
    multiply(V, K, packed, shares, step, n,
             [&](int64_t i, int64_t m, int64_t j, int64_t width, const Acc* sum, int64_t sum_step) {
               to_rows(sum, sum_step, m, width, out + i * step + j, step);
             });
    scatter(d_v, out, step, at, n, to_v);
  }
};

template <class T, class Acc>
void backward(Backward<T, Acc> pass, const Tensor& grad) {
  const GemmKernels<Acc>& use = gemm_kernels<Acc>();
  const int64_t K = pass.k.channels, V = pass.v.channels, N = pass.k.positions;
  const int64_t up_k = divide_up(K, use.rows) * use.rows, up_v = divide_up(V, use.rows) * use.rows;
  const std::unique_ptr<Acc[]> packed(new Acc[up_v * K + up_k * V]);
  pass.step = tile_step<Acc>(std::max(K, V));
  pass.packed = packed.get();
  pass.packed_transposed = packed.get() + up_v * K;
  for (int64_t b = 0; b < pass.k.batch; ++b) {
    const Acc* from = static_cast<const Acc*>(grad.const_data_ptr()) + b * V * K;
    use.pack_a(from, K, 1, V, K, packed.get());
    use.pack_a(from, 1, K, K, V, packed.get() + up_v * K);
    torch::stable::parallel_for(0, divide_up(N, pass.step), grain(pass.k, pass.v, 2 * pass.step),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t t = begin; t < end; ++t) {
                                    pass.run(b, t * pass.step, std::min(pass.step, N - t * pass.step));
                                  }
                                });
  }
}

// ---- tensors

Layout layout_of(const Tensor& x) {
  const bool last = x.stride(2) != 1;
  STD_TORCH_CHECK(!last || x.stride(1) == 1 || x.numel() == 0,
                  "lic_fast: linear_attention takes dense channels or dense places");
  return {x.size(0), x.size(1), x.size(2), last, x.stride(0), last ? x.stride(2) : x.stride(1)};
}

void check(const Tensor& k, const Tensor& v, std::initializer_list<const Tensor*> alike,
           std::initializer_list<const Tensor*> wide) {
  const int32_t code = dtype_code(k);
  STD_TORCH_CHECK(k.dim() == 3 && v.dim() == 3 && k.size(0) == v.size(0) && k.size(2) == v.size(2),
                  "lic_fast: linear_attention takes [B, K, N] and [B, V, N]");
  STD_TORCH_CHECK(dtype_code(v) == code, "lic_fast: linear_attention takes tensors alike");
  for (const Tensor* t : alike) {
    STD_TORCH_CHECK(dtype_code(*t) == code, "lic_fast: linear_attention takes tensors alike");
  }
  for (const Tensor* t : wide) {
    STD_TORCH_CHECK(t->is_contiguous() && dtype_code(*t) == (code == kFloat64 ? kFloat64 : kFloat32),
                    "lic_fast: linear_attention takes sums of the arithmetic's dtype");
  }
}

void linear_attention_context_out(Tensor k, Tensor v, Tensor context, Tensor statistics) {
  check(k, v, {}, {&context, &statistics});
  const Layout of_k = layout_of(k), of_v = layout_of(v);
  switch (dtype_code(k)) {
    case kFloat32: return forward<float, float>(of_k, of_v, k, v, context, statistics);
    case kBFloat16: return forward<BFloat16, float>(of_k, of_v, k, v, context, statistics);
    case kFloat64: return forward<double, double>(of_k, of_v, k, v, context, statistics);
    default: STD_TORCH_CHECK(false, "lic_fast: linear_attention takes float32, bfloat16 and float64");
  }
}

void linear_attention_context_bwd_out(Tensor grad, Tensor k, Tensor v, Tensor inner, Tensor statistics, Tensor d_k,
                                      Tensor d_v) {
  check(k, v, {&d_k, &d_v}, {&grad, &inner, &statistics});
  const auto run = [&](auto element, auto zero) {
    using T = decltype(element);
    using Acc = decltype(zero);
    backward<T, Acc>(
        {layout_of(k), layout_of(v), layout_of(d_k), layout_of(d_v), 0, static_cast<const T*>(k.const_data_ptr()),
         static_cast<const T*>(v.const_data_ptr()), static_cast<const Acc*>(inner.const_data_ptr()),
         static_cast<const Acc*>(statistics.const_data_ptr()), nullptr, nullptr,
         static_cast<T*>(d_k.mutable_data_ptr()), static_cast<T*>(d_v.mutable_data_ptr())},
        grad);
  };
  switch (dtype_code(k)) {
    case kFloat32: return run(0.0f, 0.0f);
    case kBFloat16: return run(BFloat16{}, 0.0f);
    case kFloat64: return run(0.0, 0.0);
    default: STD_TORCH_CHECK(false, "lic_fast: linear_attention takes float32, bfloat16 and float64");
  }
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cpp, m) {
  m.def("linear_attention_context_out(Tensor k, Tensor v, Tensor(a!) context, Tensor(b!) statistics) -> ()");
  m.def(
      "linear_attention_context_bwd_out(Tensor grad, Tensor k, Tensor v, Tensor inner, Tensor statistics, "
      "Tensor(a!) d_k, Tensor(b!) d_v) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("linear_attention_context_out", TORCH_BOX(&lic_fast::linear_attention_context_out));
  m.impl("linear_attention_context_bwd_out", TORCH_BOX(&lic_fast::linear_attention_context_bwd_out));
}
