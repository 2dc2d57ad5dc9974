// Convolution of int16 by int16 into int32, requantised by shifts: the networks that every decoder must compute alike.
//
// Bound by multiply-adds: a 32-bit lane takes a pair of channels at once (vpmaddwd, or vpdpwssd with its addition), so
// twice as many a vector as fp32. Pixels lie channels last, padded by zeros, so that a tap is an offset. A tile is
// kRows pixels by up to 4 groups of 16 outputs, whose sums stay in registers over all taps and channels; weights are
// packed by pairs of channels for it. Sums are modulo 2^32, so no order of them, instruction set or number of threads
// changes a bit.
#include "cpu/gemm.h"
#include "cpu/parallel.h"

namespace lic_fast {
namespace {

constexpr int64_t kOutputs = 16, kRows = 6;          // of a group; pixels of a tile
constexpr int64_t kTileSums = 4 * kOutputs * kRows;  // of the widest tile
constexpr int64_t kSerialProducts = 1 << 22;         // less than this stays on one thread

struct Avx512Vnni {};

struct Conv {
  const int16_t *x, *weights, *residual;  // [B][H + 2 pad][W + 2 pad][2 pairs]; packed; [B][H][W][O] or none
  const int32_t *bias, *shift;
  int16_t* narrow;  // [B][H][W][O], clamped to +-limit, or
  int32_t* wide;    // [B][O][H][W]
  int64_t batch, height, width, outputs, pairs, side, limit;

  int64_t pad() const { return side / 2; }
  int64_t taps() const { return side * side; }
  int64_t pixels() const { return batch * height * width; }
  int64_t groups() const { return (outputs + kOutputs - 1) / kOutputs; }
  int64_t row_step() const { return (width + 2 * pad()) * 2 * pairs; }
  const int16_t* pixel(int64_t p) const {  // its first tap
    const int64_t row = p / width, image = row / height;
    return x + ((row + 2 * pad() * image) * (width + 2 * pad()) + p % width) * 2 * pairs;
  }
};

// A tile's kernel adds, for kRows pixels, all products of G groups: sums[row][group][16]. x: each pixel's first tap.
template <class Isa>
struct Tile {
  static constexpr int kGroups = 1;

  template <int G>
  static void run(const Conv& c, const int16_t* const* x, const int16_t* weights, int32_t* sums) {
    uint32_t acc[kRows * kOutputs] = {};
    for (int64_t tap = 0; tap < c.taps(); ++tap) {
      const int64_t at = tap / c.side * c.row_step() + tap % c.side * 2 * c.pairs;
      for (int64_t pair = 0; pair < c.pairs; ++pair, weights += 2 * kOutputs) {
        uint32_t even[kOutputs], odd[kOutputs];
        for (int64_t o = 0; o < kOutputs; ++o) even[o] = weights[2 * o], odd[o] = weights[2 * o + 1];
        for (int64_t r = 0; r < kRows; ++r) {
          const uint32_t a = x[r][at + 2 * pair], b = x[r][at + 2 * pair + 1];
          for (int64_t o = 0; o < kOutputs; ++o) acc[r * kOutputs + o] += a * even[o] + b * odd[o];
        }
      }
    }
    std::memcpy(sums, acc, sizeof acc);
  }
};

#if defined(__x86_64__)
LIC_FAST_INLINE int32_t load_pair(const int16_t* from) {
  int32_t pair;
  std::memcpy(&pair, from, sizeof pair);
  return pair;
}

template <>
struct Tile<Avx2> {
  static constexpr int kGroups = 1;

  template <int G>
  LIC_FAST_TARGET(LIC_FAST_AVX2)
  static void run(const Conv& c, const int16_t* const* x, const int16_t* weights, int32_t* sums) {
    __m256i acc[kRows][2];
    for (auto& row : acc) row[0] = row[1] = _mm256_setzero_si256();
    for (int64_t tap = 0; tap < c.taps(); ++tap) {
      const int64_t at = tap / c.side * c.row_step() + tap % c.side * 2 * c.pairs;
      for (int64_t pair = 0; pair < c.pairs; ++pair, weights += 2 * kOutputs) {
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights));
        const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + kOutputs));
#pragma GCC unroll 6
        for (int64_t r = 0; r < kRows; ++r) {
          const __m256i value = _mm256_set1_epi32(load_pair(x[r] + at + 2 * pair));
          acc[r][0] = _mm256_add_epi32(acc[r][0], _mm256_madd_epi16(value, low));
          acc[r][1] = _mm256_add_epi32(acc[r][1], _mm256_madd_epi16(value, high));
        }
      }
    }
    for (int64_t r = 0; r < kRows; ++r) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + r * kOutputs), acc[r][0]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + r * kOutputs + 8), acc[r][1]);
    }
  }
};

#define LIC_FAST_VNNI LIC_FAST_AVX512 ",avx512vnni"

LIC_FAST_TARGET(LIC_FAST_VNNI) LIC_FAST_INLINE __m512i add_products(Avx512Vnni, __m512i sum, __m512i a, __m512i b) {
  return _mm512_dpwssd_epi32(sum, a, b);
}
LIC_FAST_TARGET(LIC_FAST_AVX512) LIC_FAST_INLINE __m512i add_products(Avx512, __m512i sum, __m512i a, __m512i b) {
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
}

// The two kernels of AVX-512 differ in one instruction, but a function has one target.
#define LIC_FAST_AVX512_TILE(Isa, isa)                                                                        \
  template <>                                                                                                 \
  struct Tile<Isa> {                                                                                          \
    static constexpr int kGroups = 4;                                                                         \
    template <int G>                                                                                          \
    LIC_FAST_TARGET(isa)                                                                                      \
    static void run(const Conv& c, const int16_t* const* x, const int16_t* weights, int32_t* sums) {          \
      __m512i acc[kRows][G];                                                                                  \
      _Pragma("GCC unroll 6") for (int r = 0; r < kRows; ++r) {                                               \
        _Pragma("GCC unroll 4") for (int g = 0; g < G; ++g) acc[r][g] = _mm512_setzero_si512();               \
      }                                                                                                       \
      const int64_t group = c.taps() * c.pairs * 2 * kOutputs;                                                \
      for (int64_t tap = 0; tap < c.taps(); ++tap) {                                                          \
        const int64_t at = tap / c.side * c.row_step() + tap % c.side * 2 * c.pairs;                          \
        for (int64_t pair = 0; pair < c.pairs; ++pair, weights += 2 * kOutputs) {                             \
          __m512i w[G];                                                                                       \
          _Pragma("GCC unroll 4") for (int g = 0; g < G; ++g) w[g] = _mm512_loadu_si512(weights + g * group); \
          _Pragma("GCC unroll 6") for (int r = 0; r < kRows; ++r) {                                           \
            const __m512i value = _mm512_set1_epi32(load_pair(x[r] + at + 2 * pair));                         \
            _Pragma("GCC unroll 4") for (int g = 0; g < G; ++g) acc[r][g] =                                   \
                add_products(Isa(), acc[r][g], value, w[g]);                                                  \
          }                                                                                                   \
        }                                                                                                     \
      }                                                                                                       \
      _Pragma("GCC unroll 6") for (int r = 0; r < kRows; ++r) {                                               \
        _Pragma("GCC unroll 4") for (int g = 0; g < G; ++g)                                                   \
            _mm512_storeu_si512(sums + (r * G + g) * kOutputs, acc[r][g]);                                    \
      }                                                                                                       \
    }                                                                                                         \
  }
LIC_FAST_AVX512_TILE(Avx512, LIC_FAST_AVX512);
LIC_FAST_AVX512_TILE(Avx512Vnni, LIC_FAST_VNNI);
#undef LIC_FAST_AVX512_TILE
#endif

// sums[row][step] of outputs [first, first + n): requantised, written for `rows` pixels from p on.
LIC_FAST_INLINE void finish(const Conv& c, int64_t p, int64_t rows, int64_t first, int64_t n, int64_t step,
                            int32_t* sums) {
  const int32_t *bias = c.bias + first, *shift = c.shift + first;
  for (int64_t r = 0; r < rows; ++r, sums += step) {
    for (int64_t o = 0; o < n; ++o) {
      sums[o] =
          static_cast<int32_t>(static_cast<uint32_t>(sums[o]) + static_cast<uint32_t>(bias[o])) >> (shift[o] & 31);
    }
    const int64_t at = (p + r) * c.outputs + first;
    if (c.residual) {
      for (int64_t o = 0; o < n; ++o) {
        sums[o] = static_cast<int32_t>(static_cast<uint32_t>(sums[o]) + static_cast<uint32_t>(c.residual[at + o]));
      }
    }
    if (c.narrow) {
      const int32_t limit = static_cast<int32_t>(c.limit);
      for (int64_t o = 0; o < n; ++o) {
        const int32_t low = sums[o] < -limit ? -limit : sums[o];
        c.narrow[at + o] = static_cast<int16_t>(low > limit ? limit : low);
      }
    } else {
      const int64_t plane = c.height * c.width, image = (p + r) / plane;
      int32_t* to = c.wide + (image * c.outputs + first) * plane + (p + r) % plane;
      for (int64_t o = 0; o < n; ++o) to[o * plane] = sums[o];
    }
  }
}

template <class Isa, int G>
LIC_FAST_INLINE void tile(const Conv& c, int64_t p, int64_t group) {
  alignas(64) int32_t sums[kTileSums];
  const int64_t rows = std::min(kRows, c.pixels() - p), first = group * kOutputs;
  const int16_t* x[kRows];
  for (int64_t r = 0; r < kRows; ++r) x[r] = c.pixel(std::min(p + r, c.pixels() - 1));
  Tile<Isa>::template run<G>(c, x, c.weights + group * c.taps() * c.pairs * 2 * kOutputs, sums);
  finish(c, p, rows, first, std::min<int64_t>(G * kOutputs, c.outputs - first), G * kOutputs, sums);
}

// Tiles [begin, end), all pixels of the first groups' first.
template <class Isa>
LIC_FAST_INLINE void run_tiles_body(const Conv& c, int64_t begin, int64_t end) {
  constexpr int kMost = Tile<Isa>::kGroups;
  const int64_t tiles = (c.pixels() + kRows - 1) / kRows;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t group = t / tiles * kMost, p = t % tiles * kRows;
    const int64_t left = std::min<int64_t>(kMost, c.groups() - group);
    if constexpr (kMost == 4) {
      if (left == 4) tile<Isa, 4>(c, p, group);
      if (left == 3) tile<Isa, 3>(c, p, group);
      if (left == 2) tile<Isa, 2>(c, p, group);
    }
    if (left == 1) tile<Isa, 1>(c, p, group);
  }
}

struct Variant {
  void (*run)(const Conv& c, int64_t begin, int64_t end);
  int64_t groups;  // of a tile
};

template <class Isa>
Variant variant();

#define LIC_FAST_VARIANT(Isa, target)                                                                             \
  target static void run_##Isa(const Conv& c, int64_t begin, int64_t end) { run_tiles_body<Isa>(c, begin, end); } \
  template <>                                                                                                     \
  Variant variant<Isa>() {                                                                                        \
    return {run_##Isa, Tile<Isa>::kGroups};                                                                       \
  }
LIC_FAST_VARIANT(Generic, )
#if defined(__x86_64__)
LIC_FAST_VARIANT(Avx2, LIC_FAST_TARGET(LIC_FAST_AVX2))
LIC_FAST_VARIANT(Avx512, LIC_FAST_TARGET(LIC_FAST_AVX512))
LIC_FAST_VARIANT(Avx512Vnni, LIC_FAST_TARGET(LIC_FAST_VNNI))

Variant best_variant() {  // LIC_FAST_SIMD=avx512 leaves out what not every AVX-512 processor has
  const char* wish = std::getenv("LIC_FAST_SIMD");
  __builtin_cpu_init();
  const bool plain = (wish && !std::strcmp(wish, "avx512")) || !__builtin_cpu_supports("avx512vnni");
  return select_simd(variant<Generic>, variant<Avx2>, plain ? variant<Avx512> : variant<Avx512Vnni>)();
}
#else
Variant best_variant() { return variant<Generic>(); }
#endif

const Variant kVariant = best_variant();

// to [n] <- f(from), to leaky or not.
template <class Isa>
LIC_FAST_INLINE void activate_body(const int16_t* __restrict__ from, int64_t n, bool leaky, int16_t* __restrict__ to) {
  if (!leaky) {
    std::memcpy(to, from, n * sizeof *to);
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const int16_t slow = static_cast<int16_t>((from[i] * 328 + (1 << 14)) >> 15);
    to[i] = from[i] > slow ? from[i] : slow;
  }
}

LIC_FAST_SIMD_VARIANTS(activate, (const int16_t* from, int64_t n, bool leaky, int16_t* to), (from, n, leaky, to));

// x [B][H][W][C] as Conv reads it: through the activation, within zeros, channels even in number.
void stage(const Conv& c, const int16_t* x, int64_t channels, bool leaky, int16_t* to) {
  const int64_t across = c.width + 2 * c.pad(), down = c.height + 2 * c.pad(), step = 2 * c.pairs;
  const int64_t grain = std::max<int64_t>(1, kSerialElements / (across * step));
  torch::stable::parallel_for(0, c.batch * down, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int16_t* row = to + i * across * step;
      const int64_t image = i / down, y = i % down - c.pad();
      if (y < 0 || y >= c.height) {
        std::fill_n(row, across * step, int16_t(0));
        continue;
      }
      const int16_t* from = x + (image * c.height + y) * c.width * channels;
      std::fill_n(row, c.pad() * step, int16_t(0));
      std::fill_n(row + (c.pad() + c.width) * step, c.pad() * step, int16_t(0));
      row += c.pad() * step;
      if (channels == step) {
        activate(from, c.width * channels, leaky, row);
        continue;
      }
      for (int64_t j = 0; j < c.width; ++j) {
        activate(from + j * channels, channels, leaky, row + j * step);
        row[j * step + channels] = 0;
      }
    }
  });
}

// x, residual and an int16 out: dense and channels last; packed [groups, side * side, pairs, 16, 2].
void integer_conv2d_out(Tensor x, Tensor packed, Tensor bias, Tensor shift, std::optional<Tensor> residual, bool leaky,
                        int64_t limit, int64_t side, Tensor out) {
  static thread_local Workspace workspace;
  const int64_t channels = x.size(1);
  Conv c{};
  c.batch = x.size(0), c.height = x.size(2), c.width = x.size(3), c.outputs = out.size(1), c.side = side;
  c.pairs = (channels + 1) / 2, c.limit = limit;
  STD_TORCH_CHECK(packed.is_contiguous() && bias.is_contiguous() && shift.is_contiguous() &&
                      packed.numel() == c.groups() * c.taps() * c.pairs * 2 * kOutputs && bias.numel() == c.outputs &&
                      shift.numel() == c.outputs && dtype_code(out) == (limit > 0 ? kInt16 : kInt32),
                  "integer_conv2d: arguments that do not belong together; please report this");
  c.weights = static_cast<const int16_t*>(packed.const_data_ptr());
  c.bias = static_cast<const int32_t*>(bias.const_data_ptr());
  c.shift = static_cast<const int32_t*>(shift.const_data_ptr());
  if (residual) c.residual = static_cast<const int16_t*>(residual->const_data_ptr());
  if (limit > 0) {
    c.narrow = static_cast<int16_t*>(out.mutable_data_ptr());
  } else {
    c.wide = static_cast<int32_t*>(out.mutable_data_ptr());
  }
  c.x = static_cast<const int16_t*>(x.const_data_ptr());
  if (leaky || side > 1 || channels % 2) {
    const int64_t count = c.batch * (c.height + 2 * c.pad()) * (c.width + 2 * c.pad()) * 2 * c.pairs;
    int16_t* staged = workspace.get<int16_t>(Workspace::kPackedA, count);
    stage(c, c.x, channels, leaky, staged);
    c.x = staged;
  }
  const int64_t tiles = (c.pixels() + kRows - 1) / kRows;
  const int64_t blocks = (c.groups() + kVariant.groups - 1) / kVariant.groups;
  const int64_t products = kRows * kVariant.groups * kOutputs * c.taps() * 2 * c.pairs;
  torch::stable::parallel_for(0, tiles * blocks, std::max<int64_t>(1, kSerialProducts / products),
                              [&](int64_t begin, int64_t end) { kVariant.run(c, begin, end); });
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cpp, m) {
  m.def(
      "integer_conv2d_out(Tensor x, Tensor packed, Tensor bias, Tensor shift, Tensor? residual, bool leaky, int limit, "
      "int side, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("integer_conv2d_out", TORCH_BOX(&lic_fast::integer_conv2d_out));
}
