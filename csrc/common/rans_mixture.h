// The mixtures of docs/BITSTREAM.md, section 7: cumulative frequencies of an element from its integers, and the symbol
// of a slot. Exact 32-bit integer arithmetic, the same on the host and on devices.
//
// Free of torch. Tables are packed by lic_fast/functional/rans_mixture.py; `open` says how they lie in memory.
#pragma once

#include <cstdint>

#include "common/rans.h"

namespace lic_fast::rans {

constexpr int32_t kMostComponents = 16;
constexpr int32_t kMostRange = 1023;              // values of an element that are not escapes
constexpr uint32_t kWeights = 1u << 15;           // the weights of an element sum to this
constexpr int32_t kUnitBits = 10;                 // means are multiples of 2^-10 values
constexpr int32_t kMostMean = 1 << 21;            // in these units
constexpr int32_t kEntries = 64;                  // of the table of half masses
constexpr uint32_t kMostDistance = 64 * 256 - 1;  // from a mean, in 256ths of an entry
constexpr int32_t kQuantileBits = 6;

struct MixtureTables {
  int32_t precision;
  int32_t steps;            // entries that make one scale
  const uint32_t* entries;  // [64]: the mass between the mean and here in the high half, that of the entry in the low
  const uint32_t* reach;    // [17], in 16ths of a scale, by the bit length of a weight
  const int32_t* quantile;  // [64], in 256ths of a scale: where a search begins; no part of the definition
};

constexpr int64_t kMixtureWords = kTablesHeader + kEntries / 2 + 16 + kEntries / 2;

inline bool open(const int64_t* packed, int64_t words, MixtureTables* tables) {
  if (words != kMixtureWords || packed[1] != 0 || packed[0] < 12 || packed[0] > 16 || packed[3] < 1 || packed[3] > 15) {
    return false;
  }
  const int64_t* at = packed + kTablesHeader;
  *tables = {static_cast<int32_t>(packed[0]), static_cast<int32_t>(packed[3]), reinterpret_cast<const uint32_t*>(at),
             reinterpret_cast<const uint32_t*>(at + kEntries / 2),
             reinterpret_cast<const int32_t*>(at + kEntries / 2 + 16)};
  return true;
}

// Elements' integers, plane after plane: first, range, then mean and form of each component.
struct Mixtures {
  const int32_t* words;
  int64_t stride;  // from one plane to the next
  int32_t components;

  LIC_FAST_ANYWHERE Mixtures operator+(int64_t n) const { return {words + n, stride, components}; }
  LIC_FAST_ANYWHERE Mixtures& operator+=(int64_t n) {
    words += n;
    return *this;
  }
  LIC_FAST_ANYWHERE const int32_t* plane(int64_t p) const { return words + p * stride; }
  LIC_FAST_ANYWHERE const int32_t* mean(int32_t k) const { return plane(2 + 2 * k); }
  LIC_FAST_ANYWHERE const int32_t* form(int32_t k) const { return plane(3 + 2 * k); }
};

// The second integer of an element. Spread and centre say where a search begins; the bytes do not depend on them.
struct Range {
  uint32_t word;

  LIC_FAST_ANYWHERE int32_t size() const { return static_cast<int32_t>(word & 0xFFFu); }
  LIC_FAST_ANYWHERE int32_t shift() const { return static_cast<int32_t>(word >> 12 & 15u); }
  LIC_FAST_ANYWHERE int32_t centre() const { return static_cast<int32_t>((word >> 24) * (word & 0xFFFu) >> 8) + 1; }
  // 2^-10 times the first, shifted left by the second
  LIC_FAST_ANYWHERE int32_t spread() const { return static_cast<int32_t>(word >> 16 & 15u) + 16; }
  LIC_FAST_ANYWHERE int32_t spread_shift() const { return static_cast<int32_t>(word >> 20 & 15u); }
};

// The slots before number j of element i, for j from 1 to its size + 1.
LIC_FAST_ANYWHERE uint32_t cumulative(const MixtureTables& tables, const Mixtures& at, int64_t i, int32_t size,
                                      int32_t j) {
  uint32_t sum = 1u << 31;
  for (int32_t k = 0; k < at.components; ++k) {
    const int32_t y = (j << kUnitBits) - at.mean(k)[i];
    const uint32_t form = static_cast<uint32_t>(at.form(k)[i]), away = static_cast<uint32_t>(y < 0 ? -y : y);
    uint32_t u = away * (256 + (form & 255u)) >> (form >> 8 & 31u);
    u = u < kMostDistance ? u : kMostDistance;
    const uint32_t entry = tables.entries[u >> 8];
    const uint32_t mass = (form >> 16) * ((entry >> 16) + ((entry & 0xFFFFu) * (u & 255u) >> 8));
    sum += y < 0 ? 0u - mass : mass;
  }
  const uint32_t spent = (1u << tables.precision) - 1 - static_cast<uint32_t>(size);
  return static_cast<uint32_t>(j) + ((sum >> tables.precision) * spent >> (32 - tables.precision));
}

// Where a search for a slot begins: any number from 1 to size + 1 would do.
LIC_FAST_ANYWHERE int32_t guess(const MixtureTables& tables, Range range, uint32_t slot) {
  const int32_t z = tables.quantile[slot >> (tables.precision - kQuantileBits)];
  const int32_t j = range.centre() + (z * range.spread() >> (18 - range.spread_shift()));
  return j < 1 ? 1 : j > range.size() ? range.size() + 1 : j;
}

// The symbol of a slot, by steps of 1, 2, 4, ... from the guess until it lies between two probes, then by halves.
LIC_FAST_ANYWHERE Symbol find(const MixtureTables& tables, const Mixtures& at, int64_t i, uint32_t slot) {
  const Range range{static_cast<uint32_t>(at.plane(1)[i])};
  const int32_t size = range.size(), beyond = size + 2;
  int32_t low = 0, high = beyond, step = 1, j = guess(tables, range, slot);
  uint32_t start = 0, end = 1u << tables.precision;
  while (true) {
    const uint32_t before = cumulative(tables, at, i, size, j);
    if (before <= slot) {
      low = j, start = before;
    } else {
      high = j, end = before;
    }
    if (high - low == 1) return {start, end - start, static_cast<uint32_t>(low)};
    if (low == 0) {
      j = high - step > 1 ? high - step : 1;
    } else if (high == beyond) {
      j = low + step < beyond ? low + step : beyond - 1;
    } else {
      j = (low + high) >> 1;
    }
    step *= 2;
  }
}

// Which value a symbol is, its number among the slots, and its plain bits.
struct Numbered {
  int32_t value, number;
  uint32_t raw;
};
LIC_FAST_ANYWHERE Numbered numbered(int32_t first, Range range, int32_t symbol) {
  const uint32_t t = static_cast<uint32_t>(symbol) - static_cast<uint32_t>(first);
  const int32_t value = static_cast<int32_t>(t) >> range.shift(), last = range.size() + 1;
  return {value, value < 0 ? 0 : value < last ? value : last, t & ((1u << range.shift()) - 1)};
}
LIC_FAST_ANYWHERE int32_t symbol_of(int32_t first, int32_t shift, int32_t value, uint32_t raw) {
  return static_cast<int32_t>(static_cast<uint32_t>(first) + (static_cast<uint32_t>(value) << shift) + raw);
}

}  // namespace lic_fast::rans
