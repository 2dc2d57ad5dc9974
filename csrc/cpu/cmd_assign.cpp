// Assignment of every weight to the mode whose reference's trajectory it correlates with most, and its affine fit.
//
// snapshots [T, n] are read once, T streams with the next tile prefetched: 2 T bytes an element in bf16, and 13 (fp64
// snapshots: 25) written. A tile of elements becomes fp64 displacements from x_0 in the second-level cache (kTileBytes,
// for up to 1024 epochs). Then groups of modes pass over it, each step over t a product and a sum for each mode of the
// group, kept in registers with the elements in the lanes: 2 vectors x 12 modes on AVX-512 (24 of 32 registers), 2 x 5
// on the others (10 of 16). The first group also sums y and y^2. Products and sums are unfused and in the order of t,
// as in every backend; elements never mix, so threads and vectors do not show in the result. Memory beyond the outputs:
// (T tile + T M) doubles a thread. Takes snapshots bf16, fp16, fp32, fp64.
#include <cmath>
#include <limits>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace lic_fast {
namespace {

constexpr int64_t kTileBytes = int64_t{1} << 17;
constexpr int64_t kStep = 16;  // tiles are multiples: two vectors of any instruction set
constexpr int64_t kMostTile = 512;
constexpr int64_t kGrain = 1 << 12;  // elements that are worth a thread

struct Float16 {
  uint16_t bits;
};

template <class X>
LIC_FAST_INLINE double widen(X value) {
  return convert<double>(value);
}
LIC_FAST_INLINE double widen(Float16 value) {  // no branch, so that loops over it become vectors
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7FFFu) << 13;
  const uint32_t exponent = value.bits & 0x7C00u;
  // a subnormal gets an exponent, and what that adds to its value is taken away again
  const uint32_t raised = magnitude + (113u << 23);
  float small;
  std::memcpy(&small, &raised, sizeof small);
  small -= 0x1p-14f;
  uint32_t bits;
  std::memcpy(&bits, &small, sizeof bits);
  const uint32_t is_small = 0u - (exponent == 0), is_special = 0u - (exponent == 0x7C00u);
  const uint32_t large = (magnitude + (112u << 23)) | (is_special & 0x7F800000u);
  bits = (bits & is_small) | (large & ~is_small) | static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

struct Job {
  const void* snapshots;
  int64_t row;  // elements from one snapshot to the next
  int64_t epochs;
  int64_t modes;
  const double* directions;  // [modes, epochs]
  const double* mean;
  const double* norm;
  uint8_t* mode;
  void* k;
  void* d;
  void* correlation;
  int32_t type;
  int64_t tile;
};

// A thread's memory. A row of the tile is `tile` long; rows of displacements begin with t = 1.
struct Scratch {
  double* displacement;
  double* packed;  // the directions, group by group: [epochs - 1, modes of the group]
  double *first, *total, *squares, *num, *norm, *mean;
  int64_t* mode;
  double* divisor;  // norm, 1 where it is 0: num is then 0

  static int64_t doubles(const Job& job) { return (job.epochs + 6) * job.tile + job.epochs * job.modes; }

  Scratch(const Job& job, double* memory) : displacement(memory) {
    double** rows[] = {&first, &total, &squares, &num, &norm, &mean};
    memory += (job.epochs - 1) * job.tile;
    for (double** row : rows) *row = memory, memory += job.tile;
    mode = reinterpret_cast<int64_t*>(memory);
    divisor = memory + job.tile;
    packed = divisor + job.modes;
  }
};

// Modes of a group: those of an instruction set's registers, shared evenly.
template <class Isa>
constexpr int64_t kGroup = 5;
template <>
constexpr int64_t kGroup<Avx512> = 12;
template <class Isa>
constexpr int64_t kLanes = 2;
template <>
constexpr int64_t kLanes<Avx2> = 4;
template <>
constexpr int64_t kLanes<Avx512> = 8;

template <class T, int64_t kCount>
struct Vector {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
  typedef T loose __attribute__((vector_size(kCount * sizeof(T)), aligned(sizeof(T)), may_alias));
};

template <class X>
LIC_FAST_INLINE void displace(const Job& job, int64_t begin, int64_t n, const Scratch& s) {
  const X* x = static_cast<const X*>(job.snapshots) + begin;
  for (int64_t i = 0; i < n; ++i) s.first[i] = widen(x[i]);
  for (int64_t i = n; i < job.tile; ++i) s.first[i] = 0.0;
  double* y = s.displacement;
  for (int64_t t = 1; t < job.epochs; ++t, y += job.tile) {
    x += job.row;
    for (int64_t byte = 0; byte < n * static_cast<int64_t>(sizeof(X)); byte += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(x + n) + byte);  // behind the last tile: does nothing
    }
    for (int64_t i = 0; i < n; ++i) y[i] = widen(x[i]) - s.first[i];
    for (int64_t i = n; i < job.tile; ++i) y[i] = 0.0;
  }
}

template <class Isa>
LIC_FAST_INLINE void add_moments(const Job& job, const Scratch& s) {
  using V = typename Vector<double, kLanes<Isa>>::type;
  using Loose = typename Vector<double, kLanes<Isa>>::loose;
  constexpr int64_t kWidth = kLanes<Isa>;
  for (int64_t i = 0; i < job.tile; i += 2 * kWidth) {
    V total[2] = {}, squares[2] = {};
    const double* y = s.displacement + i;
    for (int64_t t = 1; t < job.epochs; ++t, y += job.tile) {
      const V a = *reinterpret_cast<const Loose*>(y), b = *reinterpret_cast<const Loose*>(y + kWidth);
      total[0] += a;
      total[1] += b;
      squares[0] += a * a;
      squares[1] += b * b;
    }
    for (int64_t v = 0; v < 2; ++v) {
      *reinterpret_cast<Loose*>(s.total + i + v * kWidth) = total[v];
      *reinterpret_cast<Loose*>(s.squares + i + v * kWidth) = squares[v];
    }
  }
}

// Modes [first, first + kModes): the better of what the tile had before and theirs; directions [epochs - 1, kModes].
template <class Isa, int64_t kModes>
LIC_FAST_INLINE void correlate(const Job& job, const Scratch& s, const double* directions, int64_t first) {
  using V = typename Vector<double, kLanes<Isa>>::type;
  using Loose = typename Vector<double, kLanes<Isa>>::loose;
  using I = typename Vector<int64_t, kLanes<Isa>>::type;
  using LooseI = typename Vector<int64_t, kLanes<Isa>>::loose;
  constexpr int64_t kWidth = kLanes<Isa>;
  for (int64_t i = 0; i < job.tile; i += 2 * kWidth) {
    V sum[kModes][2] = {};
    const double *y = s.displacement + i, *r = directions;
    for (int64_t t = 1; t < job.epochs; ++t, y += job.tile, r += kModes) {
      const V a = *reinterpret_cast<const Loose*>(y), b = *reinterpret_cast<const Loose*>(y + kWidth);
#pragma GCC unroll 12
      for (int64_t m = 0; m < kModes; ++m) {
        sum[m][0] += a * r[m];
        sum[m][1] += b * r[m];
      }
    }
#pragma GCC unroll 2
    for (int64_t v = 0; v < 2; ++v) {
      Loose* num_at = reinterpret_cast<Loose*>(s.num + i + v * kWidth);
      LooseI* mode_at = reinterpret_cast<LooseI*>(s.mode + i + v * kWidth);
      V num = first ? *num_at : sum[0][v];
      I mode = first ? *mode_at : I{};
      const I no_sign = I{} + std::numeric_limits<int64_t>::max();
#pragma GCC unroll 12
      for (int64_t m = 0; m < kModes; ++m) {
        const I larger = (V)((I)sum[m][v] & no_sign) > (V)((I)num & no_sign);
        num = larger ? sum[m][v] : num;
        mode = larger ? I{} + (first + m) : mode;
      }
      *num_at = num;
      *mode_at = mode;
    }
  }
}

template <class Isa, int64_t kModes>
LIC_FAST_INLINE void correlate_group(const Job& job, const Scratch& s, const double* directions, int64_t first,
                                     int64_t modes) {
  if constexpr (kModes > 1) {
    if (modes < kModes) return correlate_group<Isa, kModes - 1>(job, s, directions, first, modes);
  }
  correlate<Isa, kModes>(job, s, directions, first);
}

// What is not finite becomes a weight that stays at its last value.
template <class X>
LIC_FAST_INLINE void hold_non_finite(const Job& job, int64_t begin, int64_t n, const Scratch& s) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  int64_t finite = 0;
  for (int64_t i = 0; i < n; ++i) finite += s.squares[i] < kInfinity;  // false for NaN too
  if (finite == n) return;
  const X* last = static_cast<const X*>(job.snapshots) + (job.epochs - 1) * job.row + begin;
  for (int64_t i = 0; i < n; ++i) {
    if (s.squares[i] < kInfinity) continue;
    s.first[i] = widen(last[i]);
    s.total[i] = s.squares[i] = 0.0;
  }
}

// Leaves slope, level and correlation in num, first and squares.
template <class Isa>
LIC_FAST_INLINE void fit(const Job& job, const Scratch& s) {
  using V = typename Vector<double, kLanes<Isa>>::type;
  using Loose = typename Vector<double, kLanes<Isa>>::loose;
  using I = typename Vector<int64_t, kLanes<Isa>>::type;
  using LooseI = typename Vector<int64_t, kLanes<Isa>>::loose;
  constexpr int64_t kWidth = kLanes<Isa>;
  const double epochs = static_cast<double>(job.epochs);
  const V zero = {}, one = zero + 1.0;
  for (int64_t i = 0; i < job.tile; i += kWidth) {
    Loose *num = reinterpret_cast<Loose*>(s.num + i), *level = reinterpret_cast<Loose*>(s.first + i);
    Loose* squares = reinterpret_cast<Loose*>(s.squares + i);
    LooseI* mode = reinterpret_cast<LooseI*>(s.mode + i);
    const V total = *reinterpret_cast<const Loose*>(s.total + i);
    const V spread = *squares - total * total / epochs;
    const I moves = spread > zero;
    *num = moves ? (V)*num : zero;
    *mode = moves ? (I)*mode : I{};
    *squares = moves ? spread : one;
    *level = *level + total / epochs;
  }
  for (int64_t i = 0; i < job.tile; ++i) s.squares[i] = std::sqrt(s.squares[i]);
  for (int64_t i = 0; i < job.tile; ++i) {
    s.norm[i] = s.divisor[s.mode[i]];
    s.mean[i] = job.mean[s.mode[i]];
  }
  const I no_sign = I{} + std::numeric_limits<int64_t>::max();
  for (int64_t i = 0; i < job.tile; i += kWidth) {
    Loose *num = reinterpret_cast<Loose*>(s.num + i), *level = reinterpret_cast<Loose*>(s.first + i);
    Loose* root = reinterpret_cast<Loose*>(s.squares + i);
    const V r = (V)((I)*num & no_sign) / *root;
    const V slope = *num / *reinterpret_cast<const Loose*>(s.norm + i);
    *root = r > one ? one : r;
    *level = *level - slope * *reinterpret_cast<const Loose*>(s.mean + i);
    *num = slope;
  }
}

template <class Out>
LIC_FAST_INLINE void store(const Job& job, int64_t begin, int64_t n, const Scratch& s) {
  uint8_t* __restrict__ mode = job.mode + begin;
  Out* __restrict__ k = static_cast<Out*>(job.k) + begin;
  Out* __restrict__ d = static_cast<Out*>(job.d) + begin;
  Out* __restrict__ correlation = static_cast<Out*>(job.correlation) + begin;
  const int64_t* __restrict__ modes = s.mode;  // the compiler cannot know that a byte is not part of `s`
  for (int64_t i = 0; i < n; ++i) mode[i] = static_cast<uint8_t>(modes[i]);
  for (int64_t i = 0; i < n; ++i) k[i] = static_cast<Out>(s.num[i]);
  for (int64_t i = 0; i < n; ++i) d[i] = static_cast<Out>(s.first[i]);
  for (int64_t i = 0; i < n; ++i) correlation[i] = static_cast<Out>(s.squares[i]);
}

template <class Isa>
LIC_FAST_INLINE void assign_body(const Job& job, int64_t begin, int64_t end, double* memory) {
  const Scratch s(job, memory);
  const int64_t groups = (job.modes + kGroup<Isa> - 1) / kGroup<Isa>;
  const int64_t steps = job.epochs - 1;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * job.modes / groups, modes = (g + 1) * job.modes / groups - first;
    double* packed = s.packed + first * steps;
    for (int64_t t = 0; t < steps; ++t) {
      for (int64_t m = 0; m < modes; ++m) packed[t * modes + m] = job.directions[(first + m) * job.epochs + t + 1];
    }
  }
  for (int64_t m = 0; m < job.modes; ++m) s.divisor[m] = job.norm[m] > 0 ? job.norm[m] : 1.0;
  for (; begin < end; begin += job.tile) {
    const int64_t n = std::min(job.tile, end - begin);
    switch (job.type) {
      case kFloat32: displace<float>(job, begin, n, s); break;
      case kBFloat16: displace<BFloat16>(job, begin, n, s); break;
      case kFloat16: displace<Float16>(job, begin, n, s); break;
      default: displace<double>(job, begin, n, s); break;
    }
    add_moments<Isa>(job, s);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * job.modes / groups, modes = (g + 1) * job.modes / groups - first;
      correlate_group<Isa, kGroup<Isa>>(job, s, s.packed + first * steps, first, modes);
    }
    switch (job.type) {
      case kFloat32: hold_non_finite<float>(job, begin, n, s); break;
      case kBFloat16: hold_non_finite<BFloat16>(job, begin, n, s); break;
      case kFloat16: hold_non_finite<Float16>(job, begin, n, s); break;
      default: hold_non_finite<double>(job, begin, n, s); break;
    }
    fit<Isa>(job, s);
    if (job.type == kFloat64) {
      store<double>(job, begin, n, s);
    } else {
      store<float>(job, begin, n, s);
    }
  }
}

LIC_FAST_SIMD_VARIANTS(assign, (const Job& job, int64_t begin, int64_t end, double* memory), (job, begin, end, memory));

// snapshots [T, n] with adjacent elements; directions [M, T], mean and norm [M] fp64; all outputs [n].
void cmd_assign_out(Tensor snapshots, Tensor directions, Tensor mean, Tensor norm, Tensor mode, Tensor k, Tensor d,
                    Tensor correlation) {
  const int64_t n = snapshots.size(1);
  for (const Tensor* t : {&mode, &k, &d, &correlation}) {
    STD_TORCH_CHECK(t->numel() == n && t->is_contiguous(), "cmd_assign: an output of another size than snapshots");
  }
  const int64_t modes = directions.size(0);
  STD_TORCH_CHECK(1 <= modes && modes <= 256 && directions.size(1) == snapshots.size(0) && mean.numel() == modes &&
                      norm.numel() == modes,
                  "cmd_assign: refs must be [M, T] with 1 <= M <= 256 for snapshots [T, n]");
  Job job{snapshots.const_data_ptr(),
          snapshots.stride(0),
          snapshots.size(0),
          modes,
          static_cast<const double*>(directions.const_data_ptr()),
          static_cast<const double*>(mean.const_data_ptr()),
          static_cast<const double*>(norm.const_data_ptr()),
          static_cast<uint8_t*>(mode.mutable_data_ptr()),
          k.mutable_data_ptr(),
          d.mutable_data_ptr(),
          correlation.mutable_data_ptr(),
          dtype_code(snapshots),
          0};
  const int64_t fitting = kTileBytes / static_cast<int64_t>(sizeof(double)) / job.epochs / kStep * kStep;
  job.tile = std::clamp(fitting, kStep, kMostTile);
  torch::stable::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<double> memory(Scratch::doubles(job) + 8);
    const uintptr_t aligned = (reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64;
    assign(job, begin, end, reinterpret_cast<double*>(aligned));
  });
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cpp, m) {
  m.def(
      "cmd_assign_out(Tensor snapshots, Tensor directions, Tensor mean, Tensor norm, Tensor(a!) mode, Tensor(b!) k, "
      "Tensor(c!) d, Tensor(d!) correlation) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("cmd_assign_out", TORCH_BOX(&lic_fast::cmd_assign_out));
}
