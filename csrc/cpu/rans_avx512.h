// Blocks of rows with AVX-512: a vector holds 16 lanes, a row of 32 lanes is two of them, fewer lanes are one with a
// mask.
//
// Decoding: a level (8 bytes), a bucket (1) and four starts at once (8) are gathered for each lane; the second and
// third symbol of a bucket are then told apart without another look, later ones in a loop that is seldom entered.
// Encoding: a level and two starts (4) are gathered; x div f is a float quotient, made exact by its remainder: it is
// below 2^22 (the precision is 10 at least), and so at most 1 off.
#pragma once

#include "cpu/rans_scalar.h"
#include "cpu/simd.h"

#if defined(__x86_64__)

namespace lic_fast::rans::avx512 {

#define LIC_FAST_RANS LIC_FAST_TARGET(LIC_FAST_AVX512 ",bmi,bmi2,popcnt") LIC_FAST_INLINE

LIC_FAST_RANS __m512i load_levels(const Tables& tables, const float* scale, __mmask16 active) {
  const __m512i bits = _mm512_maskz_loadu_epi32(active, scale);
  const __m512i key = _mm512_sub_epi32(_mm512_srai_epi32(bits, 19), _mm512_set1_epi32(kLadderFirst));
  const __m512i rung =
      _mm512_min_epi32(_mm512_max_epi32(key, _mm512_setzero_si512()), _mm512_set1_epi32(kLadderLevels - 1));
  return _mm512_add_epi32(rung, _mm512_set1_epi32(tables.ladder));
}
LIC_FAST_RANS __m512i load_levels(const Tables&, const int32_t* index, __mmask16 active) {
  return _mm512_maskz_loadu_epi32(active, index);
}
LIC_FAST_RANS __m512i load_levels(const Tables&, const uint8_t* index, __mmask16 active) {
  return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(active, index));
}

// Looking 4 or 8 bytes up for each lane, at byte offsets. Intel's gathers are fast; on AMD's cores sixteen loads are
// faster.
struct Gathers {
  static LIC_FAST_RANS __m512i look(const void* table, __m512i at) { return _mm512_i32gather_epi32(at, table, 1); }
  static LIC_FAST_RANS __m512i look8(const void* table, __m256i at) { return _mm512_i32gather_epi64(at, table, 1); }
};

struct Loads {
  static LIC_FAST_RANS int32_t int_at(const void* table, uint32_t at) {
    int32_t value;
    std::memcpy(&value, static_cast<const char*>(table) + at, sizeof value);
    return value;
  }
  static LIC_FAST_RANS __m128i look4(const void* table, __m128i at) {
    const uint64_t a = _mm_cvtsi128_si64(at), b = _mm_extract_epi64(at, 1);
    __m128i four = _mm_cvtsi32_si128(int_at(table, static_cast<uint32_t>(a)));
    four = _mm_insert_epi32(four, int_at(table, a >> 32), 1);
    four = _mm_insert_epi32(four, int_at(table, static_cast<uint32_t>(b)), 2);
    return _mm_insert_epi32(four, int_at(table, b >> 32), 3);
  }
  static LIC_FAST_RANS __m512i look(const void* table, __m512i at) {
    const __m256i low = _mm512_castsi512_si256(at), high = _mm512_extracti64x4_epi64(at, 1);
    const __m256i a = _mm256_inserti128_si256(_mm256_castsi128_si256(look4(table, _mm256_castsi256_si128(low))),
                                              look4(table, _mm256_extracti128_si256(low, 1)), 1);
    const __m256i b = _mm256_inserti128_si256(_mm256_castsi128_si256(look4(table, _mm256_castsi256_si128(high))),
                                              look4(table, _mm256_extracti128_si256(high, 1)), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
  }
  static LIC_FAST_RANS double eight_at(const void* table, uint32_t at) {  // bits, not a number
    double value;
    std::memcpy(&value, static_cast<const char*>(table) + at, sizeof value);
    return value;
  }
  static LIC_FAST_RANS __m256i look4x8(const void* table, __m128i at) {
    const uint64_t a = _mm_cvtsi128_si64(at), b = _mm_extract_epi64(at, 1);
    const __m128d low = _mm_set_pd(eight_at(table, a >> 32), eight_at(table, static_cast<uint32_t>(a)));
    const __m128d high = _mm_set_pd(eight_at(table, b >> 32), eight_at(table, static_cast<uint32_t>(b)));
    return _mm256_castpd_si256(_mm256_insertf128_pd(_mm256_castpd128_pd256(low), high, 1));
  }
  static LIC_FAST_RANS __m512i look8(const void* table, __m256i at) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(look4x8(table, _mm256_castsi256_si128(at))),
                              look4x8(table, _mm256_extracti128_si256(at, 1)), 1);
  }
};

// 8 bytes for each lane, as their low and high halves.
struct Pairs {
  __m512i low, high;
};

template <class Look>
LIC_FAST_RANS Pairs look_pairs(const void* table, __m512i at) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  const __m512i a = Look::look8(table, _mm512_castsi512_si256(at));
  const __m512i b = Look::look8(table, _mm512_extracti64x4_epi64(at, 1));
  return {_mm512_permutex2var_epi32(a, even, b), _mm512_permutex2var_epi32(a, odd, b)};
}

// Takes words for the lanes that need one.
LIC_FAST_RANS __m512i refilled(__m512i x, __mmask16 allowed, const uint8_t*& words) {
  const __mmask16 need = _mm512_mask_cmplt_epu32_mask(allowed, x, _mm512_set1_epi32(kLow));
  const __m512i next = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)));
  const __m512i shifted = _mm512_mask_slli_epi32(x, need, x, kWordBits);
  words += 2 * __builtin_popcount(need);
  return _mm512_or_si512(shifted, _mm512_maskz_expand_epi32(need, next));
}

struct Step {
  __m512i x, value, shift;
  __mmask16 escaped;
};

template <class Look>
LIC_FAST_RANS Step take(const Tables& tables, __m512i level, __m512i x, __mmask16 active) {
  const __m512i total = _mm512_set1_epi32(1 << tables.precision);
  const __m512i key = Look::look(tables.level, _mm512_slli_epi32(level, 3));
  const __m512i row = _mm512_and_si512(key, _mm512_set1_epi32(0xFFF));
  const __m512i base = _mm512_mullo_epi32(row, _mm512_set1_epi32(2 * tables.stride));
  const __m512i slot = _mm512_and_si512(x, _mm512_sub_epi32(total, _mm512_set1_epi32(1)));
  const __m512i bucket = _mm512_add_epi32(_mm512_slli_epi32(row, kBucketBits),
                                          _mm512_srl_epi32(slot, _mm_cvtsi32_si128(tables.precision - kBucketBits)));
  __m512i number = _mm512_and_si512(Look::look(tables.bucket, bucket), _mm512_set1_epi32(0xFF));
  const __m512i low16 = _mm512_set1_epi32(0xFFFF);
  const Pairs four = look_pairs<Look>(tables.starts, _mm512_add_epi32(base, _mm512_add_epi32(number, number)));
  __m512i start = _mm512_and_si512(four.low, low16), end = _mm512_srli_epi32(four.low, 16);
  const __m512i third = _mm512_and_si512(four.high, low16), fourth = _mm512_srli_epi32(four.high, 16);
  const __mmask16 past1 = _mm512_cmpge_epu32_mask(slot, end), past2 = _mm512_cmpge_epu32_mask(slot, third);
  const __m512i one = _mm512_set1_epi32(1);
  start = _mm512_mask_mov_epi32(start, past1, end);
  end = _mm512_mask_mov_epi32(end, past1, third);
  number = _mm512_mask_add_epi32(number, past1, number, one);
  start = _mm512_mask_mov_epi32(start, past2, third);
  end = _mm512_mask_mov_epi32(end, past2, fourth);
  number = _mm512_mask_add_epi32(number, past2, number, one);
  __mmask16 past = _mm512_mask_cmpge_epu32_mask(active, slot, end);
  while (__builtin_expect(past != 0, 0)) {
    number = _mm512_mask_add_epi32(number, past, number, one);
    start = _mm512_mask_mov_epi32(start, past, end);
    const __m512i at = _mm512_add_epi32(base, _mm512_add_epi32(number, number));
    const __m512i pair = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), past, at, tables.starts, 1);
    end = _mm512_mask_srli_epi32(end, past, pair, 16);
    past = _mm512_mask_cmpge_epu32_mask(past, slot, end);
  }
  const __m512i high = _mm512_srl_epi32(x, _mm_cvtsi32_si128(tables.precision));
  const __m512i next =
      _mm512_add_epi32(_mm512_mullo_epi32(_mm512_sub_epi32(end, start), high), _mm512_sub_epi32(slot, start));
  const __m512i shift = _mm512_and_si512(_mm512_srli_epi32(key, 12), _mm512_set1_epi32(15));
  return {_mm512_mask_mov_epi32(x, active, next), _mm512_add_epi32(number, _mm512_srai_epi32(key, 16)), shift,
          _mm512_mask_cmpeq_epi32_mask(active, end, total)};
}

// The plain bits of a vector, and its symbols.
LIC_FAST_RANS __m512i finish(Step& step, __mmask16 allowed, const uint8_t*& words) {
  const __mmask16 shifted = _mm512_test_epi32_mask(step.shift, step.shift);
  if (!shifted) return step.value;
  const __m512i one = _mm512_set1_epi32(1), unit = _mm512_sllv_epi32(one, step.shift);
  const __m512i raw = _mm512_and_si512(step.x, _mm512_sub_epi32(unit, one));
  step.x = refilled(_mm512_srlv_epi32(step.x, step.shift), static_cast<__mmask16>(allowed & shifted), words);
  return _mm512_sub_epi32(_mm512_add_epi32(_mm512_sllv_epi32(step.value, step.shift), raw), _mm512_srli_epi32(unit, 1));
}

// One row of up to 16 lanes, or of up to 32.
template <class Look, int kVectors, class Index>
LIC_FAST_RANS void decode_row(Decoding& d, const Index* index, int32_t* symbols, uint32_t active, __m512i* x,
                              const uint8_t*& words) {
  const __mmask16 lanes[2] = {static_cast<__mmask16>(active), static_cast<__mmask16>(active >> 16)};
  const uint32_t allowed = d.refill ? active : 0;
  Step step[kVectors];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    step[v] = take<Look>(*d.tables, load_levels(*d.tables, index + 16 * v, lanes[v]), x[v], lanes[v]);
  }
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) step[v].x = refilled(step[v].x, static_cast<__mmask16>(allowed >> 16 * v), words);
  uint32_t escaped = 0;
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    step[v].shift = _mm512_maskz_mov_epi32(lanes[v], step[v].shift);
    const __m512i values = finish(step[v], static_cast<__mmask16>(allowed >> 16 * v), words);
    _mm512_mask_storeu_epi32(symbols + 16 * v, lanes[v], values);
    x[v] = step[v].x;
    escaped |= static_cast<uint32_t>(step[v].escaped) << 16 * v;
  }
  if (__builtin_expect(escaped != 0, 0)) mend_all(d, index, symbols, escaped);
}

template <class Look, int kVectors, class Index>
LIC_FAST_TARGET(LIC_FAST_AVX512 ",bmi,bmi2,popcnt")
void decode_vectors(Decoding& d, const Index* index, int32_t* symbols, int64_t count) {
  const uint32_t all = d.lanes == 32 ? ~0u : (1u << d.lanes) - 1;
  __m512i x[kVectors];
  for (int v = 0; v < kVectors; ++v)
    x[v] = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(all >> 16 * v), d.x + 16 * v);
  const uint8_t* words = d.words;
  for (; count >= d.lanes; count -= d.lanes, index += d.lanes, symbols += d.lanes) {
    decode_row<Look, kVectors>(d, index, symbols, kVectors == 2 ? ~0u : all, x, words);
  }
  if (count) decode_row<Look, kVectors>(d, index, symbols, (1u << count) - 1, x, words);
  d.words = words;
  for (int v = 0; v < kVectors; ++v)
    _mm512_mask_storeu_epi32(d.x + 16 * v, static_cast<__mmask16>(all >> 16 * v), x[v]);
}

template <class Look, class Index>
void decode(Decoding& d, const Index* index, int32_t* symbols, int64_t count) {
  if (d.lanes == 32) return decode_vectors<Look, 2>(d, index, symbols, count);
  if (d.lanes < 4) return scalar::decode(d, index, symbols, count);
  return decode_vectors<Look, 1>(d, index, symbols, count);
}

// Puts the low halves of the lanes in `too_large` before the words so far. Sixteen words are written, those that matter
// at their end: what lies before is room that the next ones take.
LIC_FAST_RANS __m512i put(__m512i x, __mmask16 too_large, uint16_t*& words) {
  const int32_t count = __builtin_popcount(too_large);
  const __m512i iota = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i packed = _mm512_maskz_compress_epi32(too_large, x);
  const __m512i last = _mm512_permutexvar_epi32(_mm512_add_epi32(iota, _mm512_set1_epi32(count)), packed);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(words - 16), _mm512_cvtepi32_epi16(last));
  words -= count;
  return _mm512_mask_srli_epi32(x, too_large, x, kWordBits);
}

struct Element {
  __m512i start, frequency, raw, shift, value;
  __mmask16 escaped, shifted;
};

template <class Look>
LIC_FAST_RANS Element look_up(const Tables& tables, __m512i level, __m512i symbol, __mmask16 active) {
  const Pairs entry = look_pairs<Look>(tables.level, _mm512_slli_epi32(level, 3));
  const __m512i one = _mm512_set1_epi32(1);
  const __m512i shift = _mm512_and_si512(_mm512_srli_epi32(entry.low, 12), _mm512_set1_epi32(15));
  const __m512i unit = _mm512_sllv_epi32(one, shift), t = _mm512_add_epi32(symbol, _mm512_srli_epi32(unit, 1));
  const __m512i value = _mm512_srav_epi32(t, shift);
  const __m512i number = _mm512_sub_epi32(value, _mm512_srai_epi32(entry.low, 16)), size = entry.high;
  const __m512i base =
      _mm512_mullo_epi32(_mm512_and_si512(entry.low, _mm512_set1_epi32(0xFFF)), _mm512_set1_epi32(tables.stride));
  const __m512i at = _mm512_add_epi32(base, _mm512_min_epu32(number, size));
  const __m512i pair = Look::look(tables.starts, _mm512_add_epi32(at, at));
  const __m512i start = _mm512_and_si512(pair, _mm512_set1_epi32(0xFFFF));
  return {start,
          _mm512_sub_epi32(_mm512_srli_epi32(pair, 16), start),
          _mm512_and_si512(t, _mm512_sub_epi32(unit, one)),
          shift,
          value,
          _mm512_mask_cmpge_epu32_mask(active, number, size),
          _mm512_mask_test_epi32_mask(active, shift, shift)};
}

LIC_FAST_RANS __m512i put_bits(const Element& element, __m512i x, uint16_t*& words) {
  if (!element.shifted) return x;
  const __m512i spare = _mm512_sub_epi32(_mm512_set1_epi32(32), element.shift);
  const __m512i high = _mm512_srlv_epi32(x, spare);  // a shift by 32 gives 0
  x = put(x, _mm512_mask_test_epi32_mask(element.shifted, high, high), words);
  return _mm512_mask_or_epi32(x, element.shifted, _mm512_sllv_epi32(x, element.shift), element.raw);
}

LIC_FAST_RANS __m512i put_symbol(const Element& element, __m512i x, __mmask16 active, int32_t precision,
                                 uint16_t*& words) {
  const __m128i n = _mm_cvtsi32_si128(precision);
  const __m512i f = element.frequency;
  x = put(x, _mm512_mask_cmpge_epu32_mask(active, _mm512_srl_epi32(x, _mm_cvtsi32_si128(32 - precision)), f), words);
  const __m512 ratio = _mm512_div_ps(_mm512_cvtepu32_ps(x), _mm512_cvtepi32_ps(f));
  __m512i quotient = _mm512_cvttps_epi32(ratio);
  __m512i rest = _mm512_sub_epi32(x, _mm512_mullo_epi32(quotient, f));
  const __mmask16 over = _mm512_cmplt_epi32_mask(rest, _mm512_setzero_si512()),
                  under = _mm512_cmpge_epi32_mask(rest, f);
  const __m512i one = _mm512_set1_epi32(1);
  quotient = _mm512_mask_sub_epi32(quotient, over, quotient, one);
  rest = _mm512_mask_add_epi32(rest, over, rest, f);
  quotient = _mm512_mask_add_epi32(quotient, under, quotient, one);
  rest = _mm512_mask_sub_epi32(rest, under, rest, f);
  const __m512i next = _mm512_add_epi32(_mm512_sll_epi32(quotient, n), _mm512_add_epi32(rest, element.start));
  return _mm512_mask_mov_epi32(x, active, next);
}

template <class Look, int kVectors, class Index>
LIC_FAST_RANS void encode_row(Encoding& e, const Index* index, const int32_t* symbols, uint32_t active, __m512i* x,
                              uint16_t*& words) {
  const __mmask16 lanes[2] = {static_cast<__mmask16>(active), static_cast<__mmask16>(active >> 16)};
  Element element[kVectors];
  uint32_t escaped = 0;
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const __m512i symbol = _mm512_maskz_loadu_epi32(lanes[v], symbols + 16 * v);
    element[v] = look_up<Look>(*e.tables, load_levels(*e.tables, index + 16 * v, lanes[v]), symbol, lanes[v]);
    escaped |= static_cast<uint32_t>(element[v].escaped) << 16 * v;
  }
  if (__builtin_expect(escaped != 0, 0)) {
    alignas(64) int32_t values[32] = {};
    for (int v = 0; v < kVectors; ++v) _mm512_store_si512(values + 16 * v, element[v].value);
    keep_all(*e.escapes, values, escaped);
  }
#pragma GCC unroll 2
  for (int v = kVectors - 1; v >= 0; --v) x[v] = put_bits(element[v], x[v], words);
#pragma GCC unroll 2
  for (int v = kVectors - 1; v >= 0; --v) x[v] = put_symbol(element[v], x[v], lanes[v], e.tables->precision, words);
}

template <class Look, int kVectors, class Index>
LIC_FAST_TARGET(LIC_FAST_AVX512 ",bmi,bmi2,popcnt")
void encode_vectors(Encoding& e, const Index* index, const int32_t* symbols, int64_t count) {
  const uint32_t all = e.lanes == 32 ? ~0u : (1u << e.lanes) - 1;
  __m512i x[kVectors];
  for (int v = 0; v < kVectors; ++v)
    x[v] = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(all >> 16 * v), e.x + 16 * v);
  uint16_t* words = e.words;
  int64_t first = (count - 1) / e.lanes * e.lanes;
  if (count - first < e.lanes) {
    encode_row<Look, kVectors>(e, index + first, symbols + first, (1u << (count - first)) - 1, x, words);
    first -= e.lanes;
  }
  for (; first >= 0; first -= e.lanes) {
    encode_row<Look, kVectors>(e, index + first, symbols + first, kVectors == 2 ? ~0u : all, x, words);
  }
  e.words = words;
  for (int v = 0; v < kVectors; ++v)
    _mm512_mask_storeu_epi32(e.x + 16 * v, static_cast<__mmask16>(all >> 16 * v), x[v]);
}

template <class Look, class Index>
void encode(Encoding& e, const Index* index, const int32_t* symbols, int64_t count) {
  if (e.lanes == 32) return encode_vectors<Look, 2>(e, index, symbols, count);
  if (e.lanes < 4) return scalar::encode(e, index, symbols, count);
  return encode_vectors<Look, 1>(e, index, symbols, count);
}

#undef LIC_FAST_RANS

}  // namespace lic_fast::rans::avx512

#endif
