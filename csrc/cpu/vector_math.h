// Arithmetic and elementary functions on the vectors of an instruction set, as a policy that formulas are templates
// over.
//
// VectorMath<Isa>: fp32, one register of Isa, on GCC's vector extensions; + - * / and comparisons are the language's
// own. Branch-free, accurate to a few units in the last place, NaN in gives NaN out. Only these functions fuse products
// with sums, where the instruction set can: AVX2 and AVX-512 give the same bits, Generic others. To be used inside the
// always-inline bodies of LIC_FAST_SIMD_VARIANTS only: there the compiler knows the instruction set when it makes code.
// ScalarMath: the same names for one double, by libm.
//
// Polynomials: least maximum of the relative error over the reduced range, by Lawson's iteration in fp64.
#pragma once

#include <cmath>

#include "common/polynomial.h"
#include "cpu/simd.h"

#if defined(__x86_64__)
#define LIC_FAST_VECTOR_REGISTER "v"
#else
#define LIC_FAST_VECTOR_REGISTER "w"
#endif

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors pass between functions that are always inlined

namespace lic_fast {

template <class Isa>
constexpr int64_t kVectorBytes = 16;
template <>
inline constexpr int64_t kVectorBytes<Avx2> = 32;
template <>
inline constexpr int64_t kVectorBytes<Avx512> = 64;

// What depends on the width of a vector, written out for each: g++ 12 refuses __builtin_convertvector on dependent
// types. low_product: of the low halves of 64-bit lanes by a number. pairs: a0 b0 a1 b1 ..., the first and the second
// half.
template <class Isa>
struct Lanes;
#define LIC_FAST_LANES(Isa, bytes, fusion, product, first_half, second_half)                                       \
  template <>                                                                                                      \
  struct Lanes<Isa> {                                                                                              \
    typedef float Floats __attribute__((vector_size(bytes)));                                                      \
    typedef int32_t Integers __attribute__((vector_size(bytes)));                                                  \
    typedef uint32_t Bits __attribute__((vector_size(bytes)));                                                     \
    typedef uint16_t Half __attribute__((vector_size(bytes / 2)));                                                 \
    typedef uint64_t Wide __attribute__((vector_size(bytes)));                                                     \
    static LIC_FAST_INLINE Bits widen(Half half) { return __builtin_convertvector(half, Bits); }                   \
    static LIC_FAST_INLINE Half narrow(Bits bits) { return __builtin_convertvector(bits, Half); }                  \
    static LIC_FAST_INLINE Floats to_float(Integers x) { return __builtin_convertvector(x, Floats); }              \
    static LIC_FAST_INLINE Floats fused(Floats a, Floats b, Floats c) { return fusion; }                           \
    static LIC_FAST_INLINE Wide low_product(Wide a, uint32_t b) { return product; }                                \
    static LIC_FAST_INLINE Wide first_pairs(Wide a, Wide b) { return __builtin_shuffle(a, b, Wide first_half); }   \
    static LIC_FAST_INLINE Wide second_pairs(Wide a, Wide b) { return __builtin_shuffle(a, b, Wide second_half); } \
  }
#define LIC_FAST_LIST(...) {__VA_ARGS__}
#if defined(__x86_64__)
// The builtins, not the intrinsics: code without a target may mention them as long as it is inlined where there is one.
LIC_FAST_LANES(Generic, 16, a* b + c, Wide(__builtin_ia32_pmuludq128(Integers(a), Integers(Wide{} + b))),
               LIC_FAST_LIST(0, 2), LIC_FAST_LIST(1, 3));
LIC_FAST_LANES(Avx2, 32, Floats(__builtin_ia32_vfmaddps256(a, b, c)),
               Wide(__builtin_ia32_pmuludq256(Integers(a), Integers(Wide{} + b))), LIC_FAST_LIST(0, 4, 1, 5),
               LIC_FAST_LIST(2, 6, 3, 7));
typedef long long Eight64 __attribute__((vector_size(64)));
LIC_FAST_LANES(Avx512, 64, Floats(__builtin_ia32_vfmaddps512_mask(a, b, c, -1, 4)),
               Wide(__builtin_ia32_pmuludq512_mask(Integers(a), Integers(Wide{} + b), Eight64{}, 255)),
               LIC_FAST_LIST(0, 8, 1, 9, 2, 10, 3, 11), LIC_FAST_LIST(4, 12, 5, 13, 6, 14, 7, 15));
#else
LIC_FAST_LANES(Generic, 16, a* b + c, (a & 0xFFFFFFFFu) * b, LIC_FAST_LIST(0, 2), LIC_FAST_LIST(1, 3));
LIC_FAST_LANES(Avx2, 32, a* b + c, (a & 0xFFFFFFFFu) * b, LIC_FAST_LIST(0, 4, 1, 5), LIC_FAST_LIST(2, 6, 3, 7));
LIC_FAST_LANES(Avx512, 64, a* b + c, (a & 0xFFFFFFFFu) * b, LIC_FAST_LIST(0, 8, 1, 9, 2, 10, 3, 11),
               LIC_FAST_LIST(4, 12, 5, 13, 6, 14, 7, 15));
#endif
#undef LIC_FAST_LIST
#undef LIC_FAST_LANES

// Comparisons of vectors, false where one is NaN, and choices by them. Masks are vectors of 0 and -1.
//
// g++ 12 would fold nested choices, and "and" of comparisons, into operations that it then takes apart lane by lane
// (the masks' type was chosen before it knew the instruction set). The empty statements keep it from looking across.
template <class Isa>
struct Masks {
  using Value = typename Lanes<Isa>::Floats;
  using Mask = typename Lanes<Isa>::Integers;
  static LIC_FAST_INLINE Mask less(Value a, Value b) { return a < b; }
  static LIC_FAST_INLINE Mask no_less(Value a, Value b) { return a >= b; }
  static LIC_FAST_INLINE Mask equal(Value a, Value b) { return a == b; }
  static LIC_FAST_INLINE Value select(Mask mask, Value a, Value b) {
    Value result = mask ? a : b;
    asm("" : "+" LIC_FAST_VECTOR_REGISTER(result));
    return result;
  }
  static LIC_FAST_INLINE Mask both(Mask a, Mask b) {
    asm("" : "+" LIC_FAST_VECTOR_REGISTER(a));
    return a & b;
  }
  static LIC_FAST_INLINE Mask no(Mask mask) { return ~mask; }
  static LIC_FAST_INLINE bool any(Mask mask) {
    typedef int64_t Pair __attribute__((vector_size(16)));
    Pair pairs[kVectorBytes<Isa> / 16];
    std::memcpy(pairs, &mask, sizeof pairs);
    Pair result = pairs[0];
    for (int64_t i = 1; i < kVectorBytes<Isa> / 16; ++i) result |= pairs[i];
    return (result[0] | result[1]) != 0;
  }
};
#if defined(__x86_64__)
template <>
struct Masks<Avx512> {  // a bit a lane, which is what the instructions take
  using Value = Lanes<Avx512>::Floats;
  using Mask = uint16_t;
  static LIC_FAST_INLINE Mask less(Value a, Value b) { return __builtin_ia32_cmpps512_mask(a, b, 17, -1, 4); }
  static LIC_FAST_INLINE Mask no_less(Value a, Value b) { return __builtin_ia32_cmpps512_mask(a, b, 29, -1, 4); }
  static LIC_FAST_INLINE Mask equal(Value a, Value b) { return __builtin_ia32_cmpps512_mask(a, b, 0, -1, 4); }
  static LIC_FAST_INLINE Value select(Mask mask, Value a, Value b) {
    return Value(__builtin_ia32_blendmps_512_mask(b, a, mask));
  }
  static LIC_FAST_INLINE Mask both(Mask a, Mask b) { return a & b; }
  static LIC_FAST_INLINE Mask no(Mask mask) { return ~mask; }
  static LIC_FAST_INLINE bool any(Mask mask) { return mask != 0; }
};
#endif

template <class Isa>
struct VectorMath {
  static constexpr int64_t kLanes = kVectorBytes<Isa> / 4;
  using Scalar = float;
  using Value = typename Lanes<Isa>::Floats;
  using Integers = typename Lanes<Isa>::Integers;
  using Mask = typename Masks<Isa>::Mask;
  using Bits = typename Lanes<Isa>::Bits;
  using Half = typename Lanes<Isa>::Half;

  static LIC_FAST_INLINE Value all(float value) { return Value{} + value; }
  // a * b + c, rounded once where the instruction set can. Never for noise or quantised values.
  static LIC_FAST_INLINE Value fused(Value a, Value b, Value c) { return Lanes<Isa>::fused(a, b, c); }
  static LIC_FAST_INLINE Mask less(Value a, Value b) { return Masks<Isa>::less(a, b); }
  static LIC_FAST_INLINE Mask no_less(Value a, Value b) { return Masks<Isa>::no_less(a, b); }
  static LIC_FAST_INLINE Mask equal(Value a, Value b) { return Masks<Isa>::equal(a, b); }
  static LIC_FAST_INLINE Mask less(Value a, float b) { return less(a, all(b)); }
  static LIC_FAST_INLINE Mask no_less(Value a, float b) { return no_less(a, all(b)); }
  static LIC_FAST_INLINE Mask equal(Value a, float b) { return equal(a, all(b)); }
  static LIC_FAST_INLINE Value select(Mask mask, Value a, Value b) { return Masks<Isa>::select(mask, a, b); }
  static LIC_FAST_INLINE Mask both(Mask a, Mask b) { return Masks<Isa>::both(a, b); }
  static LIC_FAST_INLINE Mask no(Mask mask) { return Masks<Isa>::no(mask); }
  static LIC_FAST_INLINE bool any(Mask mask) { return Masks<Isa>::any(mask); }
  static LIC_FAST_INLINE Value abs(Value x) { return Value(Bits(x) & 0x7FFFFFFFu); }
  static LIC_FAST_INLINE Value with_sign_of(Value x, Value sign) {  // x >= 0
    return Value(Bits(x) | (Bits(sign) & 0x80000000u));
  }
  static LIC_FAST_INLINE Value flipped(Value x, Value sign) { return Value(Bits(x) ^ (Bits(sign) & 0x80000000u)); }
  // The last bit of a number taken for a note: whether the mask was set.
  static LIC_FAST_INLINE Value noted(Value x, Mask mask) {
    return select(mask, Value(Bits(x) | 1u), Value(Bits(x) & ~1u));
  }
  static LIC_FAST_INLINE Value with_note_of(Value x, Value noted) {
    return Value((Bits(x) & ~1u) | (Bits(noted) & 1u));
  }
  static LIC_FAST_INLINE Value cleared(Value x) { return Value(Bits(x) & ~1u); }
  static LIC_FAST_INLINE Mask note(Value x) { return less(Value{}, Value((Bits(x) & 1u) << 23)); }
  // The lesser and the greater of two; a NaN in x stays.
  static LIC_FAST_INLINE Value at_most(Value x, float limit) { return ::lic_fast::at_most(x, all(limit)); }
  static LIC_FAST_INLINE Value at_least(Value x, float limit) { return ::lic_fast::at_least(x, all(limit)); }
  static LIC_FAST_INLINE Value greater(Value x, Value y) { return select(less(x, y), y, x); }
  static LIC_FAST_INLINE Value reciprocal(Value x) { return 1.0f / x; }

  static LIC_FAST_INLINE Value load(const float* from) {
    Value result;
    std::memcpy(&result, from, sizeof result);
    return result;
  }
  static LIC_FAST_INLINE Value load(const BFloat16* from) {
    Half half;
    std::memcpy(&half, from, sizeof half);
    return Value(Lanes<Isa>::widen(half) << 16);
  }
  static LIC_FAST_INLINE void store(float* to, Value x) { std::memcpy(to, &x, sizeof x); }
  // Past the caches, for large results; `to` lies at a multiple of a vector. Before another thread reads: fence().
  static LIC_FAST_INLINE void stream(float* to, Value x) {
#if defined(__x86_64__)
    if constexpr (sizeof x == 64) {
      __builtin_ia32_movntps512(to, x);
    } else if constexpr (sizeof x == 32) {
      __builtin_ia32_movntps256(to, x);
    } else {
      __builtin_ia32_movntps(to, x);
    }
#else
    store(to, x);
#endif
  }
  static LIC_FAST_INLINE void stream(BFloat16* to, Value x) { store(to, x); }
  static LIC_FAST_INLINE void fence() {
#if defined(__x86_64__)
    __builtin_ia32_sfence();
#endif
  }
  static LIC_FAST_INLINE void store(BFloat16* to, Value x) {  // round to nearest even; NaN stays NaN
    const Bits bits = Bits(x);
    const Bits rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const Half half = Lanes<Isa>::narrow((bits & 0x7FFFFFFFu) > 0x7F800000u ? Bits{} + 0x7FC0u : rounded);
    std::memcpy(to, &half, sizeof half);
  }

  // x = n ln 2 + r, |r| <= ln 2 / 2: expm1(r), and 2^n as what to add to a float's bits. n is read off the low bits
  // of a sum so large that its last bit counts whole numbers; a NaN leaves them 0.
  static LIC_FAST_INLINE Value reduced_expm1(Value x, Bits& power) {
    constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
    const Value shifted = fused(x, all(1.44269504f), all(kShift));
    const Value n = shifted - kShift;
    const Value r = fused(n, all(2.12194440e-4f), fused(n, all(-0.693359375f), x));  // first one exact
    power = Bits(shifted) << 23;
    return fused(r * r, polynomial<VectorMath>(r, 0.5f, 0.16666542f, 0.0416662805f, 0.00836664438f, 0.00139465545f), r);
  }
  static constexpr float kLargestExponent = 88.7228394f;  // beyond it exp overflows
  static constexpr float kLeastExponent = -87.3365402f;   // below it exp is no normal number, here 0

  static LIC_FAST_INLINE Value exp(Value x) {
    Bits power;
    const Value part = reduced_expm1(at_most(at_least(x, kLeastExponent), kLargestExponent), power) + 1.0f;
    const Value result = select(less(x, kLeastExponent), Value{}, Value(Bits(part) + power));
    return select(less(all(kLargestExponent), x), all(HUGE_VALF), result);
  }
  // exp for x <= 80; below -87, where results are no normal numbers, it gives 0.
  static LIC_FAST_INLINE Value exp_negative(Value x) {
    Bits power;
    const Value part = reduced_expm1(at_least(x, -87.0f), power) + 1.0f;
    return select(less(x, -87.0f), Value{}, Value(Bits(part) + power));
  }
  static LIC_FAST_INLINE Value expm1(Value x) {
    Bits power;
    const Value part = reduced_expm1(at_most(at_least(x, -40.0f), 88.0f), power);
    const Value scale = Value(Bits(all(1.0f)) + power);
    return select(less(all(88.0f), x), exp(x), fused(part, scale, scale - 1.0f));
  }
  // The same for x <= 0, where nothing overflows.
  static LIC_FAST_INLINE Value expm1_negative(Value x) {
    Bits power;
    const Value part = reduced_expm1(at_least(x, -40.0f), power);
    const Value scale = Value(Bits(all(1.0f)) + power);
    return fused(part, scale, scale - 1.0f);
  }

  // log of a positive normal number: x = 2^n (1 + f), 1 + f in [sqrt(1/2), sqrt(2)).
  static LIC_FAST_INLINE Value log_normal(Value x) {
    const Integers offset = Integers(x) - 0x3F3504F3;
    const Integers n = offset >> 23;
    const Value f = Value(Integers(x) - (n << 23)) - 1.0f;
    const Value square = f * f;
    const Value tail = polynomial<VectorMath>(f, 0.333338588f, -0.250017464f, 0.199653983f, -0.165656343f, 0.14876963f,
                                              -0.143502012f, 0.0891786367f);
    const Value power = Value(n + 0x4B400000) - 12582912.0f;  // to float, through 1.5 * 2^23
    const Value small = fused(square, all(-0.5f), fused(power, all(-2.12194440e-4f), square * f * tail));
    return fused(power, all(0.693359375f), small + f);
  }
  static LIC_FAST_INLINE Value log(Value x) {
    const Mask small = less(x, 1.17549435e-38f), positive = less(Value{}, x);
    const Value result = log_normal(select(small, x * 8388608.0f, x)) - select(small, all(15.9423847f), Value{});
    const Value special = select(equal(x, 0.0f), all(-HUGE_VALF), select(positive, x, all(NAN)));  // inf stays
    return select(both(positive, less(x, HUGE_VALF)), result, special);
  }
  static LIC_FAST_INLINE Value log1p(Value x) {
    const Value sum = x + 1.0f;
    const Value lost = (x - (sum - 1.0f)) / sum;
    return select(less(abs(x), HUGE_VALF), log(sum) + select(less(Value{}, sum), lost, Value{}), log(sum));
  }
  static LIC_FAST_INLINE Value tanh(Value x) {
    const Value fall = expm1_negative(abs(x) * -2.0f);
    return with_sign_of(abs(fall / (fall + 2.0f)), x);
  }
};

struct ScalarMath {
  static constexpr int64_t kLanes = 1;
  using Scalar = double;
  using Value = double;
  using Mask = bool;

  static LIC_FAST_INLINE double all(double value) { return value; }
  static LIC_FAST_INLINE double fused(double a, double b, double c) { return a * b + c; }
  static LIC_FAST_INLINE double select(bool mask, double a, double b) { return mask ? a : b; }
  static LIC_FAST_INLINE bool less(double a, double b) { return a < b; }
  static LIC_FAST_INLINE bool no_less(double a, double b) { return a >= b; }
  static LIC_FAST_INLINE bool equal(double a, double b) { return a == b; }
  static LIC_FAST_INLINE bool both(bool a, bool b) { return a && b; }
  static LIC_FAST_INLINE bool no(bool mask) { return !mask; }
  static LIC_FAST_INLINE bool any(bool mask) { return mask; }
  static LIC_FAST_INLINE double abs(double x) { return std::fabs(x); }
  static LIC_FAST_INLINE double with_sign_of(double x, double sign) { return std::copysign(x, sign); }
  static LIC_FAST_INLINE double noted(double x, bool mask) {
    uint64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits = (bits & ~uint64_t{1}) | mask;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
  static LIC_FAST_INLINE double with_note_of(double x, double y) { return noted(x, note(y)); }
  static LIC_FAST_INLINE double cleared(double x) { return noted(x, false); }
  static LIC_FAST_INLINE bool note(double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & 1;
  }
  static LIC_FAST_INLINE double flipped(double x, double sign) { return std::signbit(sign) ? -x : x; }
  static LIC_FAST_INLINE double at_most(double x, double limit) { return x > limit ? limit : x; }
  static LIC_FAST_INLINE double at_least(double x, double limit) { return x < limit ? limit : x; }
  static LIC_FAST_INLINE double greater(double x, double y) { return x < y ? y : x; }
  static LIC_FAST_INLINE double reciprocal(double x) { return 1.0 / x; }
  static LIC_FAST_INLINE double load(const double* from) { return *from; }
  static LIC_FAST_INLINE void store(double* to, double x) { *to = x; }
  static LIC_FAST_INLINE void stream(double* to, double x) { *to = x; }
  static LIC_FAST_INLINE void fence() {}
  static LIC_FAST_INLINE double exp(double x) { return std::exp(x); }
  static LIC_FAST_INLINE double exp_negative(double x) { return std::exp(x); }
  static LIC_FAST_INLINE double expm1(double x) { return std::expm1(x); }
  static LIC_FAST_INLINE double expm1_negative(double x) { return std::expm1(x); }
  static LIC_FAST_INLINE double log_normal(double x) { return std::log(x); }
  static LIC_FAST_INLINE double log(double x) { return std::log(x); }
  static LIC_FAST_INLINE double log1p(double x) { return std::log1p(x); }
  static LIC_FAST_INLINE double tanh(double x) { return std::tanh(x); }
  static double erfcx(double x) {  // exp(x^2) erfc(x), x >= 0; beyond 10 by its asymptotic series
    if (x < 10.0) return std::exp(x * x) * std::erfc(x);
    const double step = 0.5 / (x * x);
    double term = 1.0, sum = 1.0;
    for (int i = 1; i < 24; i += 2) sum += term *= -i * step;
    return sum * 0.56418958354775628695 / x;
  }
};

// The first n lanes, the others 0; and the first n stored.
template <class M, class T>
LIC_FAST_INLINE typename M::Value load_part(const T* from, int64_t n) {
  if (n >= M::kLanes) return M::load(from);
  T lanes[M::kLanes] = {};
  std::memcpy(lanes, from, n * sizeof(T));
  return M::load(lanes);
}
template <class M, class T>
LIC_FAST_INLINE void store_part(T* to, typename M::Value x, int64_t n) {
  if (n >= M::kLanes) return M::store(to, x);
  T lanes[M::kLanes];
  M::store(lanes, x);
  std::memcpy(to, lanes, n * sizeof(T));
}

// To dense results that begin at a multiple of a vector.
template <class M, class T>
LIC_FAST_INLINE void stream_part(T* to, typename M::Value x, int64_t n, bool streams) {
  if (streams && n >= M::kLanes) return M::stream(to, x);
  store_part<M>(to, x, n);
}

}  // namespace lic_fast
