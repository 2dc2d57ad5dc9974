// Blocks of rows with AVX2: a vector holds 8 lanes, a row of 8, 16 or 32 lanes is one, two or four of them. Partial
// rows and fewer lanes are scalar. The method is that of rans_avx512.h; words are dealt and packed by tables of
// permutations.
#pragma once

#include <array>

#include "cpu/rans_scalar.h"
#include "cpu/simd.h"

#if defined(__x86_64__)

namespace lic_fast::rans::avx2 {

#define LIC_FAST_RANS LIC_FAST_TARGET(LIC_FAST_AVX2 ",bmi,bmi2,popcnt") LIC_FAST_INLINE

// For each mask of 8 lanes, 8 lane numbers of a byte each: which word a lane takes, and which lane goes where when
// those of the mask are moved to the end.
struct Deals {
  std::array<uint64_t, 256> spread, gather;
};

constexpr Deals make_deals() {
  Deals deals{};
  for (uint32_t mask = 0; mask < 256; ++mask) {
    uint32_t chosen = 0, at = 8;
    for (uint32_t lane = 0; lane < 8; ++lane) {
      if (mask >> lane & 1) deals.spread[mask] |= static_cast<uint64_t>(chosen++) << 8 * lane;
    }
    for (int32_t lane = 7; lane >= 0; --lane) {
      if (mask >> lane & 1) deals.gather[mask] |= static_cast<uint64_t>(lane) << 8 * --at;
    }
  }
  return deals;
}
inline constexpr Deals kDeals = make_deals();

LIC_FAST_RANS __m256i all(int32_t value) { return _mm256_set1_epi32(value); }
LIC_FAST_RANS __m256i load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
LIC_FAST_RANS uint32_t bits(__m256i mask) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(mask)));
}
LIC_FAST_RANS __m256i permutation(uint64_t lanes) {
  return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(lanes)));
}

LIC_FAST_RANS __m256i load_levels(const Tables& tables, const float* scale) {
  const __m256i key = _mm256_sub_epi32(_mm256_srai_epi32(load(scale), 19), all(kLadderFirst));
  const __m256i rung = _mm256_min_epi32(_mm256_max_epi32(key, _mm256_setzero_si256()), all(kLadderLevels - 1));
  return _mm256_add_epi32(rung, all(tables.ladder));
}
LIC_FAST_RANS __m256i load_levels(const Tables&, const int32_t* index) { return load(index); }
LIC_FAST_RANS __m256i load_levels(const Tables&, const uint8_t* index) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(index)));
}

// 4 or 8 bytes for each lane, at byte offsets: loads and inserts, which no processor of these times does badly.
LIC_FAST_RANS int32_t int_at(const void* table, uint32_t at) {
  int32_t value;
  std::memcpy(&value, static_cast<const char*>(table) + at, sizeof value);
  return value;
}
LIC_FAST_RANS __m128i look4(const void* table, __m128i at) {
  const uint64_t a = _mm_cvtsi128_si64(at), b = _mm_extract_epi64(at, 1);
  __m128i four = _mm_cvtsi32_si128(int_at(table, static_cast<uint32_t>(a)));
  four = _mm_insert_epi32(four, int_at(table, a >> 32), 1);
  four = _mm_insert_epi32(four, int_at(table, static_cast<uint32_t>(b)), 2);
  return _mm_insert_epi32(four, int_at(table, b >> 32), 3);
}
LIC_FAST_RANS __m256i look(const void* table, __m256i at) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(look4(table, _mm256_castsi256_si128(at))),
                                 look4(table, _mm256_extracti128_si256(at, 1)), 1);
}
LIC_FAST_RANS double eight_at(const void* table, uint32_t at) {  // bits, not a number
  double value;
  std::memcpy(&value, static_cast<const char*>(table) + at, sizeof value);
  return value;
}
LIC_FAST_RANS __m256 look8(const void* table, __m128i at) {
  const uint64_t a = _mm_cvtsi128_si64(at), b = _mm_extract_epi64(at, 1);
  const __m128d low = _mm_set_pd(eight_at(table, a >> 32), eight_at(table, static_cast<uint32_t>(a)));
  const __m128d high = _mm_set_pd(eight_at(table, b >> 32), eight_at(table, static_cast<uint32_t>(b)));
  return _mm256_castpd_ps(_mm256_insertf128_pd(_mm256_castpd128_pd256(low), high, 1));
}

struct Pairs {
  __m256i low, high;
};
LIC_FAST_RANS Pairs look_pairs(const void* table, __m256i at) {  // the shuffles leave 0 1 4 5 2 3 6 7
  const __m256i order = _mm256_set_epi32(7, 6, 3, 2, 5, 4, 1, 0);
  const __m256 a = look8(table, _mm256_castsi256_si128(at)), b = look8(table, _mm256_extracti128_si256(at, 1));
  return {_mm256_permutevar8x32_epi32(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)), order),
          _mm256_permutevar8x32_epi32(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xDD)), order)};
}

// Takes words for the lanes of `allowed` that need one.
LIC_FAST_RANS __m256i refilled(__m256i x, __m256i allowed, const uint8_t*& words) {
  const __m256i low = _mm256_cmpeq_epi32(_mm256_srli_epi32(x, kWordBits), _mm256_setzero_si256());
  const __m256i need = _mm256_and_si256(low, allowed);
  const uint32_t mask = bits(need);
  const __m256i next = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words)));
  const __m256i dealt = _mm256_permutevar8x32_epi32(next, permutation(kDeals.spread[mask]));
  words += 2 * __builtin_popcount(mask);
  return _mm256_blendv_epi8(x, _mm256_or_si256(_mm256_slli_epi32(x, kWordBits), dealt), need);
}

struct Step {
  __m256i x, value, shift, escaped;
};

LIC_FAST_RANS Step take(const Tables& tables, __m256i level, __m256i x) {
  const __m256i total = all(1 << tables.precision), one = all(1);
  const __m256i key = look(tables.level, _mm256_slli_epi32(level, 3)), row = _mm256_and_si256(key, all(0xFFF));
  const __m256i base = _mm256_mullo_epi32(row, all(2 * tables.stride));
  const __m256i slot = _mm256_and_si256(x, _mm256_sub_epi32(total, one));
  const __m256i bucket = _mm256_add_epi32(_mm256_slli_epi32(row, kBucketBits),
                                          _mm256_srl_epi32(slot, _mm_cvtsi32_si128(tables.precision - kBucketBits)));
  __m256i number = _mm256_and_si256(look(tables.bucket, bucket), all(0xFF));
  const Pairs four = look_pairs(tables.starts, _mm256_add_epi32(base, _mm256_add_epi32(number, number)));
  __m256i start = _mm256_and_si256(four.low, all(0xFFFF)), end = _mm256_srli_epi32(four.low, 16);
  const __m256i third = _mm256_and_si256(four.high, all(0xFFFF)), fourth = _mm256_srli_epi32(four.high, 16);
  const __m256i short1 = _mm256_cmpgt_epi32(end, slot), short2 = _mm256_cmpgt_epi32(third, slot);
  number = _mm256_add_epi32(_mm256_add_epi32(number, all(2)), _mm256_add_epi32(short1, short2));
  start = _mm256_blendv_epi8(third, _mm256_blendv_epi8(end, start, short1), short2);
  end = _mm256_blendv_epi8(fourth, _mm256_blendv_epi8(third, end, short1), short2);
  __m256i within = _mm256_cmpgt_epi32(end, slot);
  while (__builtin_expect(bits(within) != 0xFF, 0)) {
    number = _mm256_add_epi32(number, _mm256_andnot_si256(within, one));
    start = _mm256_blendv_epi8(end, start, within);
    const __m256i pair = look(tables.starts, _mm256_add_epi32(base, _mm256_add_epi32(number, number)));
    end = _mm256_blendv_epi8(_mm256_srli_epi32(pair, 16), end, within);
    within = _mm256_cmpgt_epi32(end, slot);
  }
  const __m256i high = _mm256_srl_epi32(x, _mm_cvtsi32_si128(tables.precision));
  const __m256i next = _mm256_mullo_epi32(_mm256_sub_epi32(end, start), high);
  return {_mm256_add_epi32(next, _mm256_sub_epi32(slot, start)), _mm256_add_epi32(number, _mm256_srai_epi32(key, 16)),
          _mm256_and_si256(_mm256_srli_epi32(key, 12), all(15)), _mm256_cmpeq_epi32(end, total)};
}

LIC_FAST_RANS __m256i finish(Step& step, __m256i allowed, const uint8_t*& words) {
  if (_mm256_testz_si256(step.shift, step.shift)) return step.value;
  const __m256i unit = _mm256_sllv_epi32(all(1), step.shift);
  const __m256i raw = _mm256_and_si256(step.x, _mm256_sub_epi32(unit, all(1)));
  const __m256i shifted = _mm256_cmpgt_epi32(step.shift, _mm256_setzero_si256());
  step.x = refilled(_mm256_srlv_epi32(step.x, step.shift), _mm256_and_si256(allowed, shifted), words);
  return _mm256_sub_epi32(_mm256_add_epi32(_mm256_sllv_epi32(step.value, step.shift), raw), _mm256_srli_epi32(unit, 1));
}

template <int kVectors, class Index>
LIC_FAST_TARGET(LIC_FAST_AVX2 ",bmi,bmi2,popcnt")
void decode_vectors(Decoding& d, const Index* index, int32_t* symbols, int64_t rows) {
  const __m256i allowed = all(d.refill ? -1 : 0);
  __m256i x[kVectors];
  for (int v = 0; v < kVectors; ++v) x[v] = load(d.x + 8 * v);
  const uint8_t* words = d.words;
  for (; rows > 0; --rows, index += 8 * kVectors, symbols += 8 * kVectors) {
    Step step[kVectors];
    for (int v = 0; v < kVectors; ++v) step[v] = take(*d.tables, load_levels(*d.tables, index + 8 * v), x[v]);
    for (int v = 0; v < kVectors; ++v) step[v].x = refilled(step[v].x, allowed, words);
    uint32_t escaped = 0;
    for (int v = 0; v < kVectors; ++v) {
      const __m256i values = finish(step[v], allowed, words);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(symbols + 8 * v), values);
      x[v] = step[v].x;
      escaped |= bits(step[v].escaped) << 8 * v;
    }
    if (__builtin_expect(escaped != 0, 0)) mend_all(d, index, symbols, escaped);
  }
  d.words = words;
  for (int v = 0; v < kVectors; ++v) _mm256_storeu_si256(reinterpret_cast<__m256i*>(d.x + 8 * v), x[v]);
}

template <class Index>
void decode(Decoding& d, const Index* index, int32_t* symbols, int64_t count) {
  const int64_t rows = d.lanes < 8 ? 0 : count / d.lanes, done = rows * d.lanes;
  if (d.lanes == 32) decode_vectors<4>(d, index, symbols, rows);
  if (d.lanes == 16) decode_vectors<2>(d, index, symbols, rows);
  if (d.lanes == 8) decode_vectors<1>(d, index, symbols, rows);
  scalar::decode(d, index + done, symbols + done, count - done);
}

// Puts the low halves of the lanes in `too_large` before the words so far; eight words are written, those that matter
// last.
LIC_FAST_RANS __m256i put(__m256i x, __m256i too_large, uint16_t*& words) {
  const uint32_t mask = bits(too_large);
  const __m256i last = _mm256_permutevar8x32_epi32(_mm256_and_si256(x, all(0xFFFF)), permutation(kDeals.gather[mask]));
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(last), _mm256_extracti128_si256(last, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(words - 8), packed);
  words -= __builtin_popcount(mask);
  return _mm256_blendv_epi8(x, _mm256_srli_epi32(x, kWordBits), too_large);
}

struct Element {
  __m256i start, frequency, raw, shift, value, escaped;
};

LIC_FAST_RANS Element look_up(const Tables& tables, __m256i level, __m256i symbol) {
  const Pairs entry = look_pairs(tables.level, _mm256_slli_epi32(level, 3));
  const __m256i one = all(1), shift = _mm256_and_si256(_mm256_srli_epi32(entry.low, 12), all(15));
  const __m256i unit = _mm256_sllv_epi32(one, shift), t = _mm256_add_epi32(symbol, _mm256_srli_epi32(unit, 1));
  const __m256i value = _mm256_srav_epi32(t, shift);
  const __m256i number = _mm256_sub_epi32(value, _mm256_srai_epi32(entry.low, 16));
  const __m256i in_row = _mm256_min_epu32(number, entry.high);
  const __m256i base = _mm256_mullo_epi32(_mm256_and_si256(entry.low, all(0xFFF)), all(tables.stride));
  const __m256i at = _mm256_add_epi32(base, in_row), pair = look(tables.starts, _mm256_add_epi32(at, at));
  const __m256i start = _mm256_and_si256(pair, all(0xFFFF));
  return {start,
          _mm256_sub_epi32(_mm256_srli_epi32(pair, 16), start),
          _mm256_and_si256(t, _mm256_sub_epi32(unit, one)),
          shift,
          value,
          _mm256_cmpeq_epi32(in_row, entry.high)};
}

LIC_FAST_RANS __m256i put_bits(const Element& element, __m256i x, uint16_t*& words) {
  if (_mm256_testz_si256(element.shift, element.shift)) return x;
  const __m256i none = _mm256_setzero_si256();
  const __m256i high = _mm256_srlv_epi32(x, _mm256_sub_epi32(all(32), element.shift));  // a shift by 32 gives 0
  x = put(x, _mm256_cmpgt_epi32(high, none), words);
  return _mm256_or_si256(_mm256_sllv_epi32(x, element.shift), element.raw);
}

LIC_FAST_RANS __m256i put_symbol(const Element& element, __m256i x, int32_t precision, uint16_t*& words) {
  const __m256i f = element.frequency, high = _mm256_srl_epi32(x, _mm_cvtsi32_si128(32 - precision));
  x = put(x, _mm256_xor_si256(_mm256_cmpgt_epi32(f, high), all(-1)), words);
  const __m256 of_x =
      _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(x, 16)), _mm256_set1_ps(65536.0f)),
                    _mm256_cvtepi32_ps(_mm256_and_si256(x, all(0xFFFF))));
  __m256i quotient = _mm256_cvttps_epi32(_mm256_div_ps(of_x, _mm256_cvtepi32_ps(f)));
  __m256i rest = _mm256_sub_epi32(x, _mm256_mullo_epi32(quotient, f));
  const __m256i over = _mm256_cmpgt_epi32(_mm256_setzero_si256(), rest);
  const __m256i within = _mm256_cmpgt_epi32(f, rest), under = _mm256_xor_si256(within, all(-1));
  quotient = _mm256_sub_epi32(_mm256_add_epi32(quotient, over), under);
  rest = _mm256_add_epi32(rest, _mm256_sub_epi32(_mm256_and_si256(over, f), _mm256_and_si256(under, f)));
  return _mm256_add_epi32(_mm256_sll_epi32(quotient, _mm_cvtsi32_si128(precision)),
                          _mm256_add_epi32(rest, element.start));
}

template <int kVectors, class Index>
LIC_FAST_TARGET(LIC_FAST_AVX2 ",bmi,bmi2,popcnt")
void encode_vectors(Encoding& e, const Index* index, const int32_t* symbols, int64_t rows) {
  __m256i x[kVectors];
  for (int v = 0; v < kVectors; ++v) x[v] = load(e.x + 8 * v);
  uint16_t* words = e.words;
  for (int64_t first = (rows - 1) * 8 * kVectors; first >= 0; first -= 8 * kVectors) {
    Element element[kVectors];
    uint32_t escaped = 0;
    for (int v = 0; v < kVectors; ++v) {
      element[v] = look_up(*e.tables, load_levels(*e.tables, index + first + 8 * v), load(symbols + first + 8 * v));
      escaped |= bits(element[v].escaped) << 8 * v;
    }
    if (__builtin_expect(escaped != 0, 0)) {
      int32_t values[8 * kVectors];
      for (int v = 0; v < kVectors; ++v)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + 8 * v), element[v].value);
      keep_all(*e.escapes, values, escaped);
    }
    for (int v = kVectors - 1; v >= 0; --v) x[v] = put_bits(element[v], x[v], words);
    for (int v = kVectors - 1; v >= 0; --v) x[v] = put_symbol(element[v], x[v], e.tables->precision, words);
  }
  e.words = words;
  for (int v = 0; v < kVectors; ++v) _mm256_storeu_si256(reinterpret_cast<__m256i*>(e.x + 8 * v), x[v]);
}

template <class Index>
void encode(Encoding& e, const Index* index, const int32_t* symbols, int64_t count) {
  const int64_t rows = e.lanes < 8 ? 0 : count / e.lanes, done = rows * e.lanes;
  scalar::encode(e, index + done, symbols + done, count - done);
  if (e.lanes == 32) encode_vectors<4>(e, index, symbols, rows);
  if (e.lanes == 16) encode_vectors<2>(e, index, symbols, rows);
  if (e.lanes == 8) encode_vectors<1>(e, index, symbols, rows);
}

#undef LIC_FAST_RANS

}  // namespace lic_fast::rans::avx2

#endif
