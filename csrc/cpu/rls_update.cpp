// A step of recursive least squares of w ~ k r + d for the free embeddable elements of a partly embedded model:
//     e = (w - k r) - d;  k <- k + e g0;  d <- d + e g1;  change = |e| norm
// with r, g0, g1 and norm of the element's mode. Reads w (4 bytes) and code (1), k and d (8) of embeddable elements,
// writes k and d back (8), and change (4): 25 bytes an element in fp32, every byte once. k and d hold only embeddable
// elements; a block of 1024 places finds its first one in `base`, so that blocks are independent. Blocks are walked in
// stretches that fit the first-level cache: k and d are spread to their places (not where all elements of the
// stretch are embeddable), the four values of each mode looked up, then plain loops; a stretch without free elements
// reads its code only. Takes w fp32 or bf16 with k, d, change fp32, and fp64 throughout. Arithmetic is unfused, in
// fp64. A block whose coefficients would lie outside k and d is skipped, and the op raises at its end.
#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu/embedded.h"

namespace lic_fast {
namespace {

constexpr int64_t kStretch = 128;  // divides kBlock
constexpr int64_t kGrain = 32;     // blocks: less than this stays on one thread

enum Column : int64_t { kR, kG0, kG1, kNorm, kColumns };

struct Gains {  // NaN beyond the last mode
  alignas(64) double rows[kModes][kColumns];
  alignas(64) double first16[kColumns][16];  // the same of the first modes, by column
  int64_t modes;
};

struct Values {  // of each element of a stretch
  alignas(64) double of[kColumns][kStretch];
};

struct Block {  // the part of it that lies in a tensor
  const void* w;
  const uint8_t* code;
  void* k;  // the block's first coefficient
  void* d;
  void* change;  // or null
  int64_t n;
  int64_t room;  // coefficients from the block's first one on; less than none where that lies outside the tensors
  int32_t type;  // of w
};

LIC_FAST_INLINE bool is_embeddable(uint8_t code) { return (code & kOutside) != kOutside; }
LIC_FAST_INLINE bool is_free(uint8_t code) { return is_embeddable(code) & (code < kStateless); }

LIC_FAST_INLINE void look_up(const Gains& gains, const uint8_t* code, int64_t begin, int64_t n, Values& out) {
  for (int64_t i = begin; i < n; ++i) {
    for (int64_t c = 0; c < kColumns; ++c) out.of[c][i] = gains.rows[code[i] & kOutside][c];
  }
}

template <class Isa>
struct LookUpGains {
  static LIC_FAST_INLINE void run(const Gains& gains, const uint8_t* code, int64_t n, Values& out) {
    look_up(gains, code, 0, n, out);
  }
};

// Spreads the `count` compact coefficients of a stretch to the places of embeddable elements (any value elsewhere), and
// gathers them back. Without branches: which elements are embeddable is not to be foreseen.
template <class Isa, class K>
struct Spread {
  static LIC_FAST_INLINE void out(const K* __restrict__ compact, int64_t count, const uint8_t* __restrict__ code,
                                  int64_t n, K* __restrict__ wide) {
    for (int64_t i = 0, j = 0; i < n; ++i) {
      wide[i] = compact[j < count ? j : count - 1];
      j += is_embeddable(code[i]);
    }
  }
  static LIC_FAST_INLINE void back(const K* __restrict__ wide, int64_t count, const uint8_t* __restrict__ code,
                                   int64_t n, K* __restrict__ compact) {
    K packed[kStretch + 1];
    for (int64_t i = 0, j = 0; i < n; ++i) {
      packed[j] = wide[i];
      j += is_embeddable(code[i]);
    }
    std::copy(packed, packed + count, compact);
  }
};

#if defined(__x86_64__)
template <>
struct LookUpGains<Avx2> {  // rows of four, four at a time, transposed: far cheaper than gathering each column
  LIC_FAST_TARGET(LIC_FAST_AVX2)
  static void run(const Gains& gains, const uint8_t* code, int64_t n, Values& out) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
      const __m256d a = _mm256_load_pd(gains.rows[code[i] & kOutside]);
      const __m256d b = _mm256_load_pd(gains.rows[code[i + 1] & kOutside]);
      const __m256d c = _mm256_load_pd(gains.rows[code[i + 2] & kOutside]);
      const __m256d d = _mm256_load_pd(gains.rows[code[i + 3] & kOutside]);
      const __m256d even_ab = _mm256_unpacklo_pd(a, b), odd_ab = _mm256_unpackhi_pd(a, b);
      const __m256d even_cd = _mm256_unpacklo_pd(c, d), odd_cd = _mm256_unpackhi_pd(c, d);
      _mm256_store_pd(out.of[kR] + i, _mm256_permute2f128_pd(even_ab, even_cd, 0x20));
      _mm256_store_pd(out.of[kG0] + i, _mm256_permute2f128_pd(odd_ab, odd_cd, 0x20));
      _mm256_store_pd(out.of[kG1] + i, _mm256_permute2f128_pd(even_ab, even_cd, 0x31));
      _mm256_store_pd(out.of[kNorm] + i, _mm256_permute2f128_pd(odd_ab, odd_cd, 0x31));
    }
    look_up(gains, code, i, n, out);
  }
};

template <>
struct LookUpGains<Avx512> {  // 16 modes of a column live in two registers
  LIC_FAST_TARGET(LIC_FAST_AVX512)
  static void run(const Gains& gains, const uint8_t* code, int64_t n, Values& out) {
    if (gains.modes > 16) return LookUpGains<Avx2>::run(gains, code, n, out);
    const __m512d nan = _mm512_set1_pd(std::numeric_limits<double>::quiet_NaN());
    __m512d low[kColumns], high[kColumns];
#pragma GCC unroll 4
    for (int64_t c = 0; c < kColumns; ++c) {
      low[c] = _mm512_load_pd(gains.first16[c]);
      high[c] = _mm512_load_pd(gains.first16[c] + 8);
    }
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(code + i)));
      const __m512i index = _mm512_and_si512(bytes, _mm512_set1_epi64(kOutside));
      const __mmask8 within = _mm512_cmplt_epi64_mask(index, _mm512_set1_epi64(16));
#pragma GCC unroll 4
      for (int64_t c = 0; c < kColumns; ++c) {
        const __m512d found = _mm512_permutex2var_pd(low[c], index, high[c]);
        _mm512_store_pd(out.of[c] + i, _mm512_mask_mov_pd(nan, within, found));
      }
    }
    look_up(gains, code, i, n, out);
  }
};

LIC_FAST_TARGET(LIC_FAST_AVX512) LIC_FAST_INLINE uint32_t embeddable16(const uint8_t* code) {
  const __m128i mode = _mm_and_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(code)), _mm_set1_epi8(kOutside));
  return _mm_cmpneq_epi8_mask(mode, _mm_set1_epi8(kOutside));
}

template <>
struct Spread<Avx512, float> {
  using Portable = Spread<Avx2, float>;

  LIC_FAST_TARGET(LIC_FAST_AVX512)
  static void out(const float* compact, int64_t count, const uint8_t* code, int64_t n, float* wide) {
    int64_t i = 0, j = 0;
    for (; i + 16 <= n; i += 16) {
      const uint32_t mask = embeddable16(code + i);
      const int32_t found = __builtin_popcount(mask);
      const __m512 packed = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << found) - 1), compact + j);
      _mm512_storeu_ps(wide + i, _mm512_maskz_expand_ps(static_cast<__mmask16>(mask), packed));
      j += found;
    }
    if (j < count) Portable::out(compact + j, count - j, code + i, n - i, wide + i);
  }
  // compressed in a register, then stored under a mask: a compressing store is slow on some processors
  LIC_FAST_TARGET(LIC_FAST_AVX512)
  static void back(const float* wide, int64_t count, const uint8_t* code, int64_t n, float* compact) {
    int64_t i = 0, j = 0;
    for (; i + 16 <= n; i += 16) {
      const uint32_t mask = embeddable16(code + i);
      const int32_t found = __builtin_popcount(mask);
      const __m512 packed = _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), _mm512_loadu_ps(wide + i));
      _mm512_mask_storeu_ps(compact + j, static_cast<__mmask16>((1u << found) - 1), packed);
      j += found;
    }
    if (j < count) Portable::back(wide + i, count - j, code + i, n - i, compact + j);
  }
};
#endif

// What the loops over a stretch ask of an element, as wide as k: so that they vectorise.
template <class K>
struct Rules {
  using Mask = std::conditional_t<sizeof(K) == 4, int32_t, int64_t>;
  alignas(64) Mask moves[kStretch];
  alignas(64) K kept[kStretch];  // change where it does not move: inf where tied for a while, else NaN

  LIC_FAST_INLINE Rules(const uint8_t* __restrict__ code, int64_t n) {
    const K inf = std::numeric_limits<K>::infinity(), nan = std::numeric_limits<K>::quiet_NaN();
    for (int64_t i = 0; i < n; ++i) {
      const Mask c = code[i], mode = c & kOutside, state = c & (kTied | kStateless);
      moves[i] = (mode != kOutside) & (state == 0);
      kept[i] = select((mode != kOutside) & (state == kTied), inf, nan);
    }
  }
};

// k and d: at each place of the stretch. change: or null
template <class W, class K>
LIC_FAST_INLINE void update(const W* __restrict__ w, const Rules<K>& rules, const Values& v, K* __restrict__ k,
                            K* __restrict__ d, K* __restrict__ change, int64_t n) {
  alignas(64) K new_k[kStretch], new_d[kStretch], distance[kStretch];
  for (int64_t i = 0; i < n; ++i) {
    const double old_k = k[i], old_d = d[i];
    const double e = (convert<double>(w[i]) - old_k * v.of[kR][i]) - old_d;
    new_k[i] = static_cast<K>(old_k + e * v.of[kG0][i]);
    new_d[i] = static_cast<K>(old_d + e * v.of[kG1][i]);
    distance[i] = static_cast<K>(std::fabs(e) * v.of[kNorm][i]);
  }
  for (int64_t i = 0; i < n; ++i) {
    const K old_k = k[i], old_d = d[i];
    k[i] = select(rules.moves[i] != 0, new_k[i], old_k);
    d[i] = select(rules.moves[i] != 0, new_d[i], old_d);
  }
  if (!change) return;
  for (int64_t i = 0; i < n; ++i) change[i] = select(rules.moves[i] != 0, distance[i], rules.kept[i]);
}

// The number of coefficients of the stretch.
template <class Isa, class W, class K>
LIC_FAST_INLINE int64_t run_stretch(const W* w, const uint8_t* code, K* k, K* d, K* change, int64_t n,
                                    const Gains& gains) {
  int32_t embeddable = 0, moving = 0;
  for (int64_t i = 0; i < n; ++i) {
    embeddable += is_embeddable(code[i]);
    moving += is_free(code[i]);
  }
  const Rules<K> rules(code, n);
  if (moving == 0) {
    if (change) std::copy(rules.kept, rules.kept + n, change);
    return embeddable;
  }
  Values values;
  LookUpGains<Isa>::run(gains, code, n, values);
  if (embeddable == n) {
    update<W, K>(w, rules, values, k, d, change, n);
  } else {
    alignas(64) K wide_k[kStretch], wide_d[kStretch];
    Spread<Isa, K>::out(k, embeddable, code, n, wide_k);
    Spread<Isa, K>::out(d, embeddable, code, n, wide_d);
    update<W, K>(w, rules, values, wide_k, wide_d, change, n);
    Spread<Isa, K>::back(wide_k, embeddable, code, n, k);
    Spread<Isa, K>::back(wide_d, embeddable, code, n, d);
  }
  return embeddable;
}

// Asks for what the next stretches will touch: the loops over a stretch run out of the first-level cache, and the
// hardware, which watches misses, would stay idle meanwhile.
template <class T>
LIC_FAST_INLINE void prefetch(const void* data) {
  constexpr int64_t kAhead = 4, kLine = 64, kBytes = kStretch * sizeof(T);
  const char* next = reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(data) + kAhead * kBytes);
  for (int64_t i = 0; i < kBytes; i += kLine) __builtin_prefetch(next + i);
}

// False, nothing written, where the block has more coefficients than there is room for.
template <class Isa, class W, class K>
LIC_FAST_INLINE bool run_typed(const Block& b, const Gains& gains) {
  int32_t embeddable = 0;
  for (int64_t i = 0; i < b.n; ++i) embeddable += is_embeddable(b.code[i]);
  if (embeddable > b.room) return false;
  K *k = static_cast<K*>(b.k), *d = static_cast<K*>(b.d), *change = static_cast<K*>(b.change);
  const W* w = static_cast<const W*>(b.w);
  for (int64_t begin = 0; begin < b.n; begin += kStretch) {
    const int64_t n = std::min(kStretch, b.n - begin);
    prefetch<K>(k);
    prefetch<K>(d);
    prefetch<W>(w + begin);
    if (change) prefetch<K>(change + begin);
    const int64_t taken =
        run_stretch<Isa, W, K>(w + begin, b.code + begin, k, d, change ? change + begin : nullptr, n, gains);
    k += taken;
    d += taken;
  }
  if (change) std::fill(change + b.n, change + kBlock, std::numeric_limits<K>::quiet_NaN());  // padding
  return true;
}

template <class Isa>
LIC_FAST_INLINE void run_block_body(const Block& b, const Gains& gains, bool* fits) {
  switch (b.type) {
    case kFloat32: *fits = run_typed<Isa, float, float>(b, gains); break;
    case kBFloat16: *fits = run_typed<Isa, BFloat16, float>(b, gains); break;
    default: *fits = run_typed<Isa, double, double>(b, gains);
  }
}

LIC_FAST_SIMD_VARIANTS(run_block, (const Block& b, const Gains& gains, bool* fits), (b, gains, fits));

Gains padded(const Tensor& table) {
  Gains gains;
  gains.modes = table.size(0);
  const double* data = static_cast<const double*>(table.const_data_ptr());
  for (int64_t m = 0; m < kModes; ++m) {
    for (int64_t c = 0; c < kColumns; ++c) {
      gains.rows[m][c] = m < gains.modes ? data[kColumns * m + c] : std::numeric_limits<double>::quiet_NaN();
      if (m < 16) gains.first16[c][m] = gains.rows[m][c];
    }
  }
  return gains;
}

bool is_flat(const Tensor& tensor, ScalarType type, int64_t elements) {
  return tensor.is_cpu() && tensor.scalar_type() == type && tensor.is_contiguous() && tensor.numel() == elements;
}

// Returns false, having written nothing, where the tensors are not what the loops can walk.
bool rls_update_(std::vector<Tensor> params, Tensor code, Tensor base, Tensor k, Tensor d, Tensor gains,
                 std::optional<Tensor> change) {
  if (params.empty()) return false;
  const int32_t type = dtype_code(params[0]);
  if (type != kFloat32 && type != kBFloat16 && type != kFloat64) return false;
  const ScalarType wide = type == kFloat64 ? ScalarType::Double : ScalarType::Float;
  std::vector<int64_t> first{0};  // block of each tensor
  for (const Tensor& p : params) {
    if (!p.is_cpu() || dtype_code(p) != type || !is_dense(p)) return false;
    first.push_back(first.back() + (p.numel() + kBlock - 1) / kBlock);
  }
  const int64_t blocks = first.back();
  if (!is_flat(code, ScalarType::Byte, blocks * kBlock) || !is_flat(base, ScalarType::Long, 2 * blocks)) return false;
  if (!is_flat(k, wide, d.numel()) || !is_flat(d, wide, k.numel())) return false;
  if (gains.dim() != 2 || gains.size(0) >= kModes) return false;
  if (!is_flat(gains, ScalarType::Double, kColumns * gains.size(0))) return false;
  if (change && !is_flat(*change, wide, blocks * kBlock)) return false;

  const Gains table = padded(gains);
  const int64_t* slots = static_cast<const int64_t*>(base.const_data_ptr());
  const int64_t w_size = static_cast<int64_t>(params[0].element_size());
  const int64_t k_size = static_cast<int64_t>(k.element_size());
  std::vector<const void*> data;
  for (const Tensor& p : params) data.push_back(p.const_data_ptr());
  void *k_data = k.mutable_data_ptr(), *d_data = d.mutable_data_ptr();
  void* change_data = change ? change->mutable_data_ptr() : nullptr;
  const uint8_t* code_data = static_cast<const uint8_t*>(code.const_data_ptr());
  const int64_t coefficients = k.numel();
  std::atomic<bool> wrong{false};
  torch::stable::parallel_for(0, blocks, kGrain, [&](int64_t begin, int64_t end) {
    size_t t = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t b = begin; b < end; ++b) {
      while (b >= first[t + 1]) ++t;
      const int64_t at = (b - first[t]) * kBlock;
      const bool inside = 0 <= slots[2 * b + 1] && slots[2 * b + 1] <= coefficients;
      const int64_t slot = inside ? slots[2 * b + 1] : 0;
      bool fits;
      run_block({advance(data[t], at, w_size), code_data + b * kBlock, advance(k_data, slot, k_size),
                 advance(d_data, slot, k_size), advance(change_data, b * kBlock, k_size),
                 std::min(kBlock, params[t].numel() - at), inside ? coefficients - slot : -1, type},
                table, &fits);
      if (!fits) wrong = true;
    }
  });
  STD_TORCH_CHECK(!wrong,
                  "rls_update_: base does not count what code holds; make it anew with FlatLayout.base_of(code)");
  return true;
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cpp, m) {
  m.def(
      "rls_update_(Tensor[] params, Tensor code, Tensor base, Tensor(a!) k, Tensor(b!) d, Tensor gains,"
      " Tensor(c!)? change) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("rls_update_", TORCH_BOX(&lic_fast::rls_update_));
}
