// Blocks of rows of mixtures in plain C++, and what every instruction set shares about them.
#pragma once

#include "cpu/rans_scalar.h"
#include "cpu/simd.h"

namespace lic_fast::rans {

// Whether elements are what the search and the states rely on: weights that sum to kWeights, ranges and means within
// their limits. Without branches, so that it vectorises.
template <class Isa>
LIC_FAST_INLINE void valid_elements_body(const Mixtures* elements, int64_t count, uint32_t* wrong) {
  constexpr int64_t kTile = 512;
  for (int64_t first = 0; first < count; first += kTile) {
    const Mixtures at = *elements + first;
    const int64_t n = count - first < kTile ? count - first : kTile;
    uint32_t sum[kTile], found = 0;
    for (int64_t i = 0; i < n; ++i) {
      sum[i] = 0;
      found |= (static_cast<uint32_t>(at.plane(1)[i]) & 0xFFFu) - 1 >= static_cast<uint32_t>(kMostRange);
    }
    for (int32_t k = 0; k < at.components; ++k) {
      const int32_t *mean = at.mean(k), *form = at.form(k);
      for (int64_t i = 0; i < n; ++i) {
        sum[i] += static_cast<uint32_t>(form[i]) >> 16;
        found |= static_cast<uint32_t>(mean[i]) + kMostMean > 2u * kMostMean;
      }
    }
    for (int64_t i = 0; i < n; ++i) found |= sum[i] ^ kWeights;
    *wrong |= found;
  }
}
LIC_FAST_SIMD_VARIANTS(valid_elements, (const Mixtures* elements, int64_t count, uint32_t* wrong),
                       (elements, count, wrong));

inline bool valid(const Mixtures& elements, int64_t count) {
  uint32_t wrong = 0;
  valid_elements(&elements, count, &wrong);
  return wrong == 0;
}

// Found by scalar::encode through its arguments' namespace.
inline Coded coded(const MixtureTables& tables, const Mixtures& at, int64_t i, int32_t symbol) {
  return coded(tables, MixtureView(at, i), symbol);
}

// The escaped lanes of a row, in their order.
inline __attribute__((noinline)) void mend_mixtures(DecodingOf<MixtureTables>& d, const Mixtures& at, int32_t* symbols,
                                                    uint32_t escaped) {
  for (; escaped; escaped &= escaped - 1) {
    const int32_t i = __builtin_ctz(escaped), first = at.words[i];
    const int32_t shift = Range{static_cast<uint32_t>(at.plane(1)[i])}.shift();
    const uint32_t raw = (static_cast<uint32_t>(symbols[i]) - static_cast<uint32_t>(first)) & ((1u << shift) - 1);
    symbols[i] = symbol_of(first, shift, d.escapes->next(), raw);
  }
}

namespace scalar {

inline void decode_mixture_row(DecodingOf<MixtureTables>& d, const Mixtures& at, int32_t* symbols, int32_t active) {
  const MixtureTables& tables = *d.tables;
  const uint32_t mask = (1u << tables.precision) - 1;
  uint32_t escaped = 0, shifted = 0, number[kMostLanes];
  for (int32_t i = 0; i < active; ++i) {
    const Range range{static_cast<uint32_t>(at.plane(1)[i])};
    const uint32_t slot = d.x[i] & mask;
    const Symbol symbol = find(tables, MixtureView(at, i), slot);
    const uint32_t x = taken(d.x[i], symbol, slot, tables.precision);
    d.x[i] = d.refill ? refilled(x, d.words) : x;
    number[i] = symbol.number;
    symbols[i] = symbol_of(at.words[i], range.shift(), static_cast<int32_t>(symbol.number), 0);
    escaped |= static_cast<uint32_t>(symbol.number - 1 >= static_cast<uint32_t>(range.size())) << i;
    shifted |= static_cast<uint32_t>(range.shift() != 0) << i;
  }
  for (; shifted; shifted &= shifted - 1) {
    const int32_t i = __builtin_ctz(shifted), k = Range{static_cast<uint32_t>(at.plane(1)[i])}.shift();
    const uint32_t raw = d.x[i] & ((1u << k) - 1), x = d.x[i] >> k;
    d.x[i] = d.refill ? refilled(x, d.words) : x;
    symbols[i] = symbol_of(at.words[i], k, static_cast<int32_t>(number[i]), raw);
  }
  if (escaped) mend_mixtures(d, at, symbols, escaped);
}

inline void decode_mixtures(DecodingOf<MixtureTables>& d, Mixtures at, int32_t* symbols, int64_t count) {
  for (; count > 0; count -= d.lanes, at += d.lanes, symbols += d.lanes) {
    decode_mixture_row(d, at, symbols, count < d.lanes ? static_cast<int32_t>(count) : d.lanes);
  }
}

}  // namespace scalar
}  // namespace lic_fast::rans
