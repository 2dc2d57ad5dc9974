// Blocks of rows of mixtures with AVX2: the method of rans_mixture_avx512.h, eight elements a vector, the table of half
// masses looked up in memory. Partial rows and fewer lanes are scalar.
#pragma once

#include "cpu/rans_avx2.h"
#include "cpu/rans_mixture_scalar.h"

#if defined(__x86_64__)

namespace lic_fast::rans::avx2 {

#define LIC_FAST_RANS LIC_FAST_TARGET(LIC_FAST_AVX2 ",bmi,bmi2,popcnt") LIC_FAST_INLINE

struct Elements {
  Mixtures at;
  __m256i word, size, spent, shift;
};

LIC_FAST_RANS Elements load_elements(const MixtureTables& tables, const Mixtures& at) {
  const __m256i word = load(at.plane(1)), size = _mm256_and_si256(word, all(0xFFF));
  return {at, word, size, _mm256_sub_epi32(all((1 << tables.precision) - 1), size),
          _mm256_and_si256(_mm256_srli_epi32(word, 12), all(15))};
}

// Adds the mass of a component below y to sum.
LIC_FAST_RANS __m256i add_mass(const MixtureTables& tables, __m256i sum, __m256i y, __m256i form) {
  const __m256i low8 = all(255), factor = _mm256_add_epi32(_mm256_and_si256(form, low8), all(256));
  const __m256i far = _mm256_srlv_epi32(_mm256_mullo_epi32(_mm256_abs_epi32(y), factor),
                                        _mm256_and_si256(_mm256_srli_epi32(form, 8), all(31)));
  const __m256i u = _mm256_min_epu32(far, all(kMostDistance));
  const __m256i entry = look(tables.entries, _mm256_slli_epi32(_mm256_srli_epi32(u, 8), 2));
  const __m256i part = _mm256_mullo_epi32(_mm256_and_si256(entry, all(0xFFFF)), _mm256_and_si256(u, low8));
  const __m256i half = _mm256_add_epi32(_mm256_srli_epi32(entry, 16), _mm256_srli_epi32(part, 8));
  const __m256i mass = _mm256_mullo_epi32(_mm256_srli_epi32(form, 16), half), sign = _mm256_srai_epi32(y, 31);
  return _mm256_add_epi32(sum, _mm256_sub_epi32(_mm256_xor_si256(mass, sign), sign));
}

LIC_FAST_RANS __m256i slots(const MixtureTables& tables, __m256i sum, __m256i spent, __m256i j) {
  const int32_t n = tables.precision;
  const __m256i share = _mm256_mullo_epi32(_mm256_srl_epi32(sum, _mm_cvtsi32_si128(n)), spent);
  return _mm256_add_epi32(j, _mm256_srl_epi32(share, _mm_cvtsi32_si128(32 - n)));
}

// The slots before number j of each element.
LIC_FAST_RANS __m256i cumulative(const MixtureTables& tables, const Elements& e, __m256i j) {
  __m256i sum = all(INT32_MIN);
  const __m256i place = _mm256_slli_epi32(j, kUnitBits);
  for (int32_t k = 0; k < e.at.components; ++k) {
    sum = add_mass(tables, sum, _mm256_sub_epi32(place, load(e.at.mean(k))), load(e.at.form(k)));
  }
  return slots(tables, sum, e.spent, j);
}

LIC_FAST_RANS __m256i guess(const MixtureTables& tables, const Elements& e, __m256i slot) {
  const __m256i part = _mm256_srl_epi32(slot, _mm_cvtsi32_si128(tables.precision - kQuantileBits)), one = all(1);
  const __m256i z = look(tables.quantile, _mm256_slli_epi32(part, 2));
  const __m256i spread = _mm256_add_epi32(_mm256_and_si256(_mm256_srli_epi32(e.word, 16), all(15)), all(16));
  const __m256i right = _mm256_sub_epi32(all(18), _mm256_and_si256(_mm256_srli_epi32(e.word, 20), all(15)));
  const __m256i away = _mm256_srav_epi32(_mm256_mullo_epi32(z, spread), right);
  const __m256i centre = _mm256_srli_epi32(_mm256_mullo_epi32(_mm256_srli_epi32(e.word, 24), e.size), 8);
  const __m256i j = _mm256_add_epi32(_mm256_add_epi32(centre, one), away);
  return _mm256_max_epi32(_mm256_min_epi32(j, _mm256_add_epi32(e.size, one)), one);
}

// The search of common/rans_mixture.h for a vector.
LIC_FAST_RANS Step take_mixtures(const MixtureTables& tables, const Mixtures& at, __m256i x) {
  const __m256i total = all(1 << tables.precision), one = all(1), none = _mm256_setzero_si256();
  const __m256i slot = _mm256_and_si256(x, _mm256_sub_epi32(total, one));
  const Elements e = load_elements(tables, at);
  const __m256i beyond = _mm256_add_epi32(e.size, all(2));
  __m256i low = none, high = beyond, start = none, end = total, step = one, j = guess(tables, e, slot);
  while (true) {
    const __m256i before = cumulative(tables, e, j), left = _mm256_cmpgt_epi32(before, slot);
    low = _mm256_blendv_epi8(j, low, left);
    start = _mm256_blendv_epi8(before, start, left);
    high = _mm256_blendv_epi8(high, j, left);
    end = _mm256_blendv_epi8(end, before, left);
    if (bits(_mm256_cmpeq_epi32(_mm256_sub_epi32(high, low), one)) == 0xFF) break;
    // an element that is found may be probed again, between its ends: at its low one, which changes nothing
    const __m256i middle = _mm256_srli_epi32(_mm256_add_epi32(low, high), 1);
    const __m256i down = _mm256_max_epi32(_mm256_sub_epi32(high, step), one);
    const __m256i up = _mm256_min_epi32(_mm256_add_epi32(low, step), _mm256_sub_epi32(beyond, one));
    j = _mm256_blendv_epi8(_mm256_blendv_epi8(middle, up, _mm256_cmpeq_epi32(high, beyond)), down,
                           _mm256_cmpeq_epi32(low, none));
    step = _mm256_add_epi32(step, step);
  }
  const __m256i quotient = _mm256_srl_epi32(x, _mm_cvtsi32_si128(tables.precision));
  const __m256i next = _mm256_mullo_epi32(_mm256_sub_epi32(end, start), quotient);
  const __m256i within = _mm256_and_si256(_mm256_cmpgt_epi32(low, none), _mm256_cmpgt_epi32(beyond, high));
  return {_mm256_add_epi32(next, _mm256_sub_epi32(slot, start)), low, e.shift, _mm256_xor_si256(within, all(-1))};
}

template <int kVectors>
LIC_FAST_TARGET(LIC_FAST_AVX2 ",bmi,bmi2,popcnt")
void decode_mixture_vectors(DecodingOf<MixtureTables>& d, Mixtures at, int32_t* symbols, int64_t rows) {
  const __m256i allowed = all(d.refill ? -1 : 0);
  __m256i x[kVectors];
  for (int v = 0; v < kVectors; ++v) x[v] = load(d.x + 8 * v);
  const uint8_t* words = d.words;
  for (; rows > 0; --rows, at += 8 * kVectors, symbols += 8 * kVectors) {
    Step step[kVectors];
    for (int v = 0; v < kVectors; ++v) step[v] = take_mixtures(*d.tables, at + 8 * v, x[v]);
    for (int v = 0; v < kVectors; ++v) step[v].x = refilled(step[v].x, allowed, words);
    uint32_t escaped = 0;
    for (int v = 0; v < kVectors; ++v) {
      const __m256i half = _mm256_srli_epi32(_mm256_sllv_epi32(all(1), step[v].shift), 1);  // which finish() takes off
      const __m256i values = _mm256_add_epi32(finish(step[v], allowed, words), half);
      const __m256i symbol = _mm256_add_epi32(values, load(at.words + 8 * v));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(symbols + 8 * v), symbol);
      x[v] = step[v].x;
      escaped |= bits(step[v].escaped) << 8 * v;
    }
    if (__builtin_expect(escaped != 0, 0)) mend_mixtures(d, at, symbols, escaped);
  }
  d.words = words;
  for (int v = 0; v < kVectors; ++v) _mm256_storeu_si256(reinterpret_cast<__m256i*>(d.x + 8 * v), x[v]);
}

inline void decode_mixtures(DecodingOf<MixtureTables>& d, Mixtures at, int32_t* symbols, int64_t count) {
  const int64_t rows = d.lanes < 8 ? 0 : count / d.lanes, done = rows * d.lanes;
  if (d.lanes == 32) decode_mixture_vectors<4>(d, at, symbols, rows);
  if (d.lanes == 16) decode_mixture_vectors<2>(d, at, symbols, rows);
  if (d.lanes == 8) decode_mixture_vectors<1>(d, at, symbols, rows);
  scalar::decode_mixtures(d, at + done, symbols + done, count - done);
}

LIC_FAST_RANS Element look_up_mixtures(const MixtureTables& tables, const Mixtures& at, __m256i symbol) {
  const __m256i one = all(1), none = _mm256_setzero_si256(), unit = all(1 << kUnitBits);
  const Elements e = load_elements(tables, at);
  const __m256i t = _mm256_sub_epi32(symbol, load(at.words)), value = _mm256_srav_epi32(t, e.shift);
  const __m256i last = _mm256_add_epi32(e.size, one), j = _mm256_max_epi32(_mm256_min_epi32(value, last), none);
  const __m256i place = _mm256_slli_epi32(j, kUnitBits);
  __m256i below = all(INT32_MIN), above = below;
  for (int32_t k = 0; k < at.components; ++k) {
    const __m256i y = _mm256_sub_epi32(place, load(at.mean(k))), form = load(at.form(k));
    below = add_mass(tables, below, y, form);
    above = add_mass(tables, above, _mm256_add_epi32(y, unit), form);
  }
  const __m256i first = _mm256_cmpeq_epi32(j, none), final = _mm256_cmpeq_epi32(j, last);
  const __m256i start = _mm256_andnot_si256(first, slots(tables, below, e.spent, j));
  const __m256i end =
      _mm256_blendv_epi8(slots(tables, above, e.spent, _mm256_add_epi32(j, one)), all(1 << tables.precision), final);
  return {start,
          _mm256_sub_epi32(end, start),
          _mm256_and_si256(t, _mm256_sub_epi32(_mm256_sllv_epi32(one, e.shift), one)),
          e.shift,
          value,
          _mm256_or_si256(first, final)};
}

template <int kVectors>
LIC_FAST_TARGET(LIC_FAST_AVX2 ",bmi,bmi2,popcnt")
void encode_mixture_vectors(EncodingOf<MixtureTables>& e, Mixtures source, const int32_t* symbols, int64_t rows) {
  __m256i x[kVectors];
  for (int v = 0; v < kVectors; ++v) x[v] = load(e.x + 8 * v);
  uint16_t* words = e.words;
  for (int64_t first = (rows - 1) * 8 * kVectors; first >= 0; first -= 8 * kVectors) {
    Element element[kVectors];
    uint32_t escaped = 0;
    for (int v = 0; v < kVectors; ++v) {
      element[v] = look_up_mixtures(*e.tables, source + (first + 8 * v), load(symbols + first + 8 * v));
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

inline void encode_mixtures(EncodingOf<MixtureTables>& e, Mixtures at, const int32_t* symbols, int64_t count) {
  const int64_t rows = e.lanes < 8 ? 0 : count / e.lanes, done = rows * e.lanes;
  scalar::encode(e, at + done, symbols + done, count - done);
  if (e.lanes == 32) encode_mixture_vectors<4>(e, at, symbols, rows);
  if (e.lanes == 16) encode_mixture_vectors<2>(e, at, symbols, rows);
  if (e.lanes == 8) encode_mixture_vectors<1>(e, at, symbols, rows);
}

#undef LIC_FAST_RANS

}  // namespace lic_fast::rans::avx2

#endif
