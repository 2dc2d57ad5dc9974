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

LIC_FAST_ANYWHERE bool open(const int64_t* packed, int64_t words, MixtureTables* tables) {
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

// An element's integers where they lie: of any number of components.
class MixtureView {
 public:
  MixtureView() = default;
  LIC_FAST_ANYWHERE MixtureView(const Mixtures& all, int64_t i)
      : at_(all + i), first_(at_.plane(0)[0]), range_{static_cast<uint32_t>(at_.plane(1)[0])} {}
  LIC_FAST_ANYWHERE int32_t first() const { return first_; }
  LIC_FAST_ANYWHERE Range range() const { return range_; }
  LIC_FAST_ANYWHERE int32_t shift() const { return range_.shift(); }
  LIC_FAST_ANYWHERE int32_t components() const { return at_.components; }
  LIC_FAST_ANYWHERE int32_t mean(int32_t k) const { return at_.mean(k)[0]; }
  LIC_FAST_ANYWHERE uint32_t form(int32_t k) const { return static_cast<uint32_t>(at_.form(k)[0]); }
  // Becomes one that is within the limits, whatever it was.
  LIC_FAST_ANYWHERE void tame() { at_.components = 0, range_ = {1}; }

 private:
  Mixtures at_;
  int32_t first_;
  Range range_;
};

// The same in registers: of K components.
template <int32_t K>
class MixtureOf {
 public:
  MixtureOf() = default;
  LIC_FAST_ANYWHERE MixtureOf(const Mixtures& all, int64_t i)
      : first_(all.plane(0)[i]), range_{static_cast<uint32_t>(all.plane(1)[i])} {
    LIC_FAST_UNROLL_ON_DEVICE
    for (int32_t k = 0; k < K; ++k) mean_[k] = all.mean(k)[i], form_[k] = static_cast<uint32_t>(all.form(k)[i]);
  }
  LIC_FAST_ANYWHERE int32_t first() const { return first_; }
  LIC_FAST_ANYWHERE Range range() const { return range_; }
  LIC_FAST_ANYWHERE int32_t shift() const { return range_.shift(); }
  LIC_FAST_ANYWHERE int32_t components() const { return K; }
  LIC_FAST_ANYWHERE int32_t mean(int32_t k) const { return mean_[k]; }
  LIC_FAST_ANYWHERE uint32_t form(int32_t k) const { return form_[k]; }
  LIC_FAST_ANYWHERE void tame() {
    LIC_FAST_UNROLL_ON_DEVICE
    for (int32_t k = 0; k < K; ++k) mean_[k] = 0, form_[k] = 0;
    range_ = {1};
  }

 private:
  int32_t first_;
  Range range_;
  int32_t mean_[K];
  uint32_t form_[K];
};

// Whether an element is what the search and the states rely on: weights that sum to kWeights, range and means within
// their limits.
template <class Mixture>
LIC_FAST_ANYWHERE bool valid(const Mixture& element) {
  uint32_t sum = 0, far = 0;
  LIC_FAST_UNROLL_ON_DEVICE
  for (int32_t k = 0; k < element.components(); ++k) {
    sum += element.form(k) >> 16;
    far |= static_cast<uint32_t>(element.mean(k)) + kMostMean > 2u * kMostMean;
  }
  return sum == kWeights && !far &&
         static_cast<uint32_t>(element.range().size()) - 1 < static_cast<uint32_t>(kMostRange);
}

// The slots before number j of an element, for j from 1 to its size + 1.
template <class Mixture>
LIC_FAST_ANYWHERE uint32_t cumulative(const MixtureTables& tables, const Mixture& element, int32_t size, int32_t j) {
  uint32_t sum = 1u << 31;
  LIC_FAST_UNROLL_ON_DEVICE
  for (int32_t k = 0; k < element.components(); ++k) {
    const int32_t y = (j << kUnitBits) - element.mean(k);
    const uint32_t form = element.form(k), away = static_cast<uint32_t>(y < 0 ? -y : y);
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

// The symbol of a slot, by steps of 1, 2, 4, ... from the guess until it lies between two probes, then by halves. Every
// probe brings the ends closer, whatever the integers are.
template <class Mixture>
LIC_FAST_ANYWHERE Symbol find(const MixtureTables& tables, const Mixture& element, uint32_t slot) {
  const Range range = element.range();
  const int32_t size = range.size(), beyond = size + 2;
  int32_t low = 0, high = beyond, step = 1, j = guess(tables, range, slot);
  uint32_t start = 0, end = 1u << tables.precision;
  while (true) {
    const uint32_t before = cumulative(tables, element, size, j);
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

// What an element is coded as.
template <class Mixture>
LIC_FAST_ANYWHERE Coded coded(const MixtureTables& tables, const Mixture& element, int32_t symbol) {
  const Range range = element.range();
  const Numbered found = numbered(element.first(), range, symbol);
  const int32_t size = range.size();
  const uint32_t start = found.number == 0 ? 0 : cumulative(tables, element, size, found.number);
  const uint32_t end =
      found.number > size ? 1u << tables.precision : cumulative(tables, element, size, found.number + 1);
  return {start, end - start, found.raw, range.shift(), found.value, found.number == 0 || found.number > size};
}

// As those of Level.
template <class Mixture>
LIC_FAST_ANYWHERE uint32_t value_of(const Mixture&, uint32_t number) {
  return number;
}
template <class Mixture>
LIC_FAST_ANYWHERE bool is_escape(const Mixture& element, uint32_t number) {
  return number - 1 >= static_cast<uint32_t>(element.range().size());
}
template <class Mixture>
LIC_FAST_ANYWHERE int32_t joined(const Mixture& element, uint32_t value, uint32_t raw) {
  return symbol_of(element.first(), element.shift(), static_cast<int32_t>(value), raw);
}
template <class Mixture>
LIC_FAST_ANYWHERE Symbol find_ahead(const MixtureTables& tables, const Mixture& element, uint32_t slot) {
  return find(tables, element, slot);
}

}  // namespace lic_fast::rans
