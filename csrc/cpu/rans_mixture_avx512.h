// Blocks of rows of mixtures with AVX-512: a vector holds 16 elements, the table of half masses lies in four registers,
// and the elements of a vector search together until the last has found its symbol.
#pragma once

#include "cpu/rans_avx512.h"
#include "cpu/rans_mixture_scalar.h"

#if defined(__x86_64__)

namespace lic_fast::rans::avx512 {

#define LIC_FAST_RANS LIC_FAST_TARGET(LIC_FAST_AVX512 ",bmi,bmi2,popcnt") LIC_FAST_INLINE

LIC_FAST_RANS __m512i all(int32_t value) { return _mm512_set1_epi32(value); }

struct MixtureRow {
  const MixtureTables* tables;
  __m512i entries[4], quantiles[4];
};

LIC_FAST_RANS MixtureRow load_tables(const MixtureTables& tables) {
  MixtureRow row{&tables, {}, {}};
  for (int v = 0; v < 4; ++v) {
    row.entries[v] = _mm512_loadu_si512(tables.entries + 16 * v);
    row.quantiles[v] = _mm512_loadu_si512(tables.quantile + 16 * v);
  }
  return row;
}

LIC_FAST_RANS __m512i look64(const __m512i* table, __m512i index) {  // permutations look at the low 5 bits
  const __m512i low = _mm512_permutex2var_epi32(table[0], index, table[1]);
  const __m512i high = _mm512_permutex2var_epi32(table[2], index, table[3]);
  return _mm512_mask_mov_epi32(low, _mm512_test_epi32_mask(index, all(32)), high);
}

// Elements of a vector, those of inactive lanes as zeros, which no arithmetic here minds.
struct Elements {
  Mixtures at;
  __mmask16 active;
  __m512i size, spent, shift;
};

LIC_FAST_RANS __m512i load_plane(const Mixtures& at, int64_t p, __mmask16 active) {
  return _mm512_maskz_loadu_epi32(active, at.plane(p));
}

// Adds the mass of a component below y to sum.
LIC_FAST_RANS __m512i add_mass(const MixtureRow& row, __m512i sum, __m512i y, __m512i form) {
  const __m512i low8 = all(255);
  const __m512i factor = _mm512_add_epi32(_mm512_and_si512(form, low8), all(256));
  const __m512i far = _mm512_srlv_epi32(_mm512_mullo_epi32(_mm512_abs_epi32(y), factor),
                                        _mm512_and_si512(_mm512_srli_epi32(form, 8), all(31)));
  const __m512i u = _mm512_min_epu32(far, all(kMostDistance));
  const __m512i entry = look64(row.entries, _mm512_srli_epi32(u, 8));
  const __m512i part = _mm512_mullo_epi32(_mm512_and_si512(entry, all(0xFFFF)), _mm512_and_si512(u, low8));
  const __m512i half = _mm512_add_epi32(_mm512_srli_epi32(entry, 16), _mm512_srli_epi32(part, 8));
  const __m512i mass = _mm512_mullo_epi32(_mm512_srli_epi32(form, 16), half);
  const __mmask16 below = _mm512_movepi32_mask(y);
  return _mm512_mask_sub_epi32(_mm512_mask_add_epi32(sum, static_cast<__mmask16>(~below), sum, mass), below, sum, mass);
}

LIC_FAST_RANS __m512i slots(const MixtureRow& row, __m512i sum, __m512i spent, __m512i j) {
  const int32_t n = row.tables->precision;
  const __m512i share = _mm512_mullo_epi32(_mm512_srl_epi32(sum, _mm_cvtsi32_si128(n)), spent);
  return _mm512_add_epi32(j, _mm512_srl_epi32(share, _mm_cvtsi32_si128(32 - n)));
}

// The slots before number j of each element.
LIC_FAST_RANS __m512i cumulative(const MixtureRow& row, const Elements& e, __m512i j) {
  __m512i sum = all(INT32_MIN);
  const __m512i place = _mm512_slli_epi32(j, kUnitBits);
  for (int32_t k = 0; k < e.at.components; ++k) {
    const __m512i y = _mm512_sub_epi32(place, load_plane(e.at, 2 + 2 * k, e.active));
    sum = add_mass(row, sum, y, load_plane(e.at, 3 + 2 * k, e.active));
  }
  return slots(row, sum, e.spent, j);
}

LIC_FAST_RANS Elements load_elements(const MixtureRow& row, const Mixtures& at, __mmask16 active, __m512i word) {
  const __m512i size = _mm512_and_si512(word, all(0xFFF));
  const __m512i spent = _mm512_sub_epi32(all((1 << row.tables->precision) - 1), size);
  return {at, active, size, spent, _mm512_and_si512(_mm512_srli_epi32(word, 12), all(15))};
}

LIC_FAST_RANS __m512i guess(const MixtureRow& row, __m512i word, __m512i size, __m512i slot) {
  const __m128i bits = _mm_cvtsi32_si128(row.tables->precision - kQuantileBits);
  const __m512i z = look64(row.quantiles, _mm512_srl_epi32(slot, bits)), one = all(1);
  const __m512i spread = _mm512_add_epi32(_mm512_and_si512(_mm512_srli_epi32(word, 16), all(15)), all(16));
  const __m512i right = _mm512_sub_epi32(all(18), _mm512_and_si512(_mm512_srli_epi32(word, 20), all(15)));
  const __m512i away = _mm512_srav_epi32(_mm512_mullo_epi32(z, spread), right);
  const __m512i centre = _mm512_srli_epi32(_mm512_mullo_epi32(_mm512_srli_epi32(word, 24), size), 8);
  const __m512i j = _mm512_add_epi32(_mm512_add_epi32(centre, one), away);
  return _mm512_max_epi32(_mm512_min_epi32(j, _mm512_add_epi32(size, one)), one);
}

// The search of common/rans_mixture.h for a vector.
LIC_FAST_RANS Step take_mixtures(const MixtureRow& row, const Mixtures& at, __m512i x, __mmask16 active) {
  const __m512i total = all(1 << row.tables->precision), one = all(1), none = _mm512_setzero_si512();
  const __m512i slot = _mm512_and_si512(x, _mm512_sub_epi32(total, one));
  const __m512i word = load_plane(at, 1, active);
  const Elements e = load_elements(row, at, active, word);
  const __m512i beyond = _mm512_add_epi32(e.size, all(2));
  __m512i low = none, high = beyond, start = none, end = total, step = one, j = guess(row, word, e.size, slot);
  while (true) {
    const __m512i before = cumulative(row, e, j);
    const __mmask16 right = _mm512_cmple_epu32_mask(before, slot), left = static_cast<__mmask16>(~right);
    low = _mm512_mask_mov_epi32(low, right, j);
    start = _mm512_mask_mov_epi32(start, right, before);
    high = _mm512_mask_mov_epi32(high, left, j);
    end = _mm512_mask_mov_epi32(end, left, before);
    const __mmask16 open = _mm512_mask_cmpneq_epi32_mask(active, _mm512_sub_epi32(high, low), one);
    if (!open) break;
    const __mmask16 none_below = _mm512_cmpeq_epi32_mask(low, none), none_above = _mm512_cmpeq_epi32_mask(high, beyond);
    const __m512i middle = _mm512_srli_epi32(_mm512_add_epi32(low, high), 1);
    const __m512i down = _mm512_max_epi32(_mm512_sub_epi32(high, step), one);
    const __m512i up = _mm512_min_epi32(_mm512_add_epi32(low, step), _mm512_sub_epi32(beyond, one));
    j = _mm512_mask_mov_epi32(_mm512_mask_mov_epi32(middle, none_above, up), none_below, down);
    step = _mm512_add_epi32(step, step);
  }
  const __m512i quotient = _mm512_srl_epi32(x, _mm_cvtsi32_si128(row.tables->precision));
  const __m512i next =
      _mm512_add_epi32(_mm512_mullo_epi32(_mm512_sub_epi32(end, start), quotient), _mm512_sub_epi32(slot, start));
  const __mmask16 within = _mm512_cmplt_epu32_mask(_mm512_sub_epi32(low, one), e.size);
  return {_mm512_mask_mov_epi32(x, active, next), low, e.shift, static_cast<__mmask16>(active & ~within)};
}

template <int kVectors>
LIC_FAST_RANS void decode_mixture_row(DecodingOf<MixtureTables>& d, const MixtureRow& row, const Mixtures& at,
                                      int32_t* symbols, uint32_t active, __m512i* x, const uint8_t*& words) {
  const __mmask16 lanes[2] = {static_cast<__mmask16>(active), static_cast<__mmask16>(active >> 16)};
  const uint32_t allowed = d.refill ? active : 0;
  Step step[kVectors];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) step[v] = take_mixtures(row, at + 16 * v, x[v], lanes[v]);
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) step[v].x = refilled(step[v].x, static_cast<__mmask16>(allowed >> 16 * v), words);
  uint32_t escaped = 0;
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const __m512i half = _mm512_srli_epi32(_mm512_sllv_epi32(all(1), step[v].shift), 1);  // which finish() takes off
    const __m512i values = finish(step[v], static_cast<__mmask16>(allowed >> 16 * v), words);
    const __m512i first = load_plane(at + 16 * v, 0, lanes[v]);
    _mm512_mask_storeu_epi32(symbols + 16 * v, lanes[v], _mm512_add_epi32(_mm512_add_epi32(values, half), first));
    x[v] = step[v].x;
    escaped |= static_cast<uint32_t>(step[v].escaped) << 16 * v;
  }
  if (__builtin_expect(escaped != 0, 0)) mend_mixtures(d, at, symbols, escaped);
}

template <int kVectors>
LIC_FAST_TARGET(LIC_FAST_AVX512 ",bmi,bmi2,popcnt")
void decode_mixture_vectors(DecodingOf<MixtureTables>& d, Mixtures at, int32_t* symbols, int64_t count) {
  const uint32_t every = d.lanes == 32 ? ~0u : (1u << d.lanes) - 1;
  const MixtureRow row = load_tables(*d.tables);
  __m512i x[kVectors];
  for (int v = 0; v < kVectors; ++v)
    x[v] = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(every >> 16 * v), d.x + 16 * v);
  const uint8_t* words = d.words;
  for (; count > 0; count -= d.lanes, at += d.lanes, symbols += d.lanes) {
    const uint32_t active = count < d.lanes ? (1u << count) - 1 : every;
    decode_mixture_row<kVectors>(d, row, at, symbols, active, x, words);
  }
  d.words = words;
  for (int v = 0; v < kVectors; ++v)
    _mm512_mask_storeu_epi32(d.x + 16 * v, static_cast<__mmask16>(every >> 16 * v), x[v]);
}

inline void decode_mixtures(DecodingOf<MixtureTables>& d, Mixtures at, int32_t* symbols, int64_t count) {
  if (d.lanes == 32) return decode_mixture_vectors<2>(d, at, symbols, count);
  if (d.lanes < 4) return scalar::decode_mixtures(d, at, symbols, count);
  decode_mixture_vectors<1>(d, at, symbols, count);
}

LIC_FAST_RANS Element look_up_mixtures(const MixtureRow& row, const Mixtures& at, __m512i symbol, __mmask16 active) {
  const __m512i one = all(1), word = load_plane(at, 1, active);
  const Elements e = load_elements(row, at, active, word);
  const __m512i t = _mm512_sub_epi32(symbol, load_plane(at, 0, active));
  const __m512i value = _mm512_srav_epi32(t, e.shift), last = _mm512_add_epi32(e.size, one);
  const __m512i j = _mm512_max_epi32(_mm512_min_epi32(value, last), _mm512_setzero_si512());
  const __m512i place = _mm512_slli_epi32(j, kUnitBits), unit = all(1 << kUnitBits);
  __m512i below = all(INT32_MIN), above = below;
  for (int32_t k = 0; k < at.components; ++k) {
    const __m512i y = _mm512_sub_epi32(place, load_plane(at, 2 + 2 * k, active));
    const __m512i form = load_plane(at, 3 + 2 * k, active);
    below = add_mass(row, below, y, form);
    above = add_mass(row, above, _mm512_add_epi32(y, unit), form);
  }
  const __mmask16 first = _mm512_testn_epi32_mask(j, j), final = _mm512_cmpeq_epi32_mask(j, last);
  const __m512i start = _mm512_mask_mov_epi32(slots(row, below, e.spent, j), first, _mm512_setzero_si512());
  const __m512i end = _mm512_mask_mov_epi32(slots(row, above, e.spent, _mm512_add_epi32(j, one)), final,
                                            all(1 << row.tables->precision));
  return {start,
          _mm512_mask_sub_epi32(one, active, end, start),
          _mm512_and_si512(t, _mm512_sub_epi32(_mm512_sllv_epi32(one, e.shift), one)),
          e.shift,
          value,
          static_cast<__mmask16>(active & (first | final)),
          _mm512_mask_test_epi32_mask(active, e.shift, e.shift)};
}

template <int kVectors>
LIC_FAST_TARGET(LIC_FAST_AVX512 ",bmi,bmi2,popcnt")
void encode_mixture_vectors(EncodingOf<MixtureTables>& e, Mixtures source, const int32_t* symbols, int64_t count) {
  const uint32_t every = e.lanes == 32 ? ~0u : (1u << e.lanes) - 1;
  const MixtureRow row = load_tables(*e.tables);
  __m512i x[kVectors];
  for (int v = 0; v < kVectors; ++v)
    x[v] = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(every >> 16 * v), e.x + 16 * v);
  uint16_t* words = e.words;
  for (int64_t at = (count - 1) / e.lanes * e.lanes; at >= 0; at -= e.lanes) {
    const uint32_t active = count - at < e.lanes ? (1u << (count - at)) - 1 : every;
    Element element[kVectors];
    uint32_t escaped = 0;
    for (int v = 0; v < kVectors; ++v) {
      const auto lanes = static_cast<__mmask16>(active >> 16 * v);
      const __m512i symbol = _mm512_maskz_loadu_epi32(lanes, symbols + at + 16 * v);
      element[v] = look_up_mixtures(row, source + (at + 16 * v), symbol, lanes);
      escaped |= static_cast<uint32_t>(element[v].escaped) << 16 * v;
    }
    if (__builtin_expect(escaped != 0, 0)) {
      alignas(64) int32_t values[32] = {};
      for (int v = 0; v < kVectors; ++v) _mm512_store_si512(values + 16 * v, element[v].value);
      keep_all(*e.escapes, values, escaped);
    }
    for (int v = kVectors - 1; v >= 0; --v) x[v] = put_bits(element[v], x[v], words);
    for (int v = kVectors - 1; v >= 0; --v)
      x[v] = put_symbol(element[v], x[v], static_cast<__mmask16>(active >> 16 * v), e.tables->precision, words);
  }
  e.words = words;
  for (int v = 0; v < kVectors; ++v)
    _mm512_mask_storeu_epi32(e.x + 16 * v, static_cast<__mmask16>(every >> 16 * v), x[v]);
}

inline void encode_mixtures(EncodingOf<MixtureTables>& e, Mixtures at, const int32_t* symbols, int64_t count) {
  if (e.lanes == 32) return encode_mixture_vectors<2>(e, at, symbols, count);
  if (e.lanes < 4) return scalar::encode(e, at, symbols, count);
  encode_mixture_vectors<1>(e, at, symbols, count);
}

#undef LIC_FAST_RANS

}  // namespace lic_fast::rans::avx512

#endif
