// Blocks of rows in plain C++, lane after lane, as docs/BITSTREAM.md says it.
#pragma once

#include "cpu/rans_block.h"

namespace lic_fast::rans::scalar {

inline uint32_t refilled(uint32_t x, const uint8_t*& words) {
  if (x >= kLow) return x;
  uint16_t word;
  std::memcpy(&word, words, sizeof word);
  words += sizeof word;
  return x << kWordBits | word;
}

template <class Index>
void decode_row(Decoding& d, const Index* index, int32_t* symbols, int32_t active) {
  const Tables& tables = *d.tables;
  const uint32_t mask = (1u << tables.precision) - 1;
  uint32_t escaped = 0, shifted = 0;
  for (int32_t i = 0; i < active; ++i) {
    const Level level = tables.level[level_of(tables, index[i])];
    const uint32_t slot = d.x[i] & mask;
    const Symbol symbol = find(tables, level, slot);
    const uint32_t x = taken(d.x[i], symbol, slot, tables.precision);
    d.x[i] = d.refill ? refilled(x, d.words) : x;
    symbols[i] = static_cast<int32_t>(symbol.number) + level.offset();
    escaped |= static_cast<uint32_t>(symbol.number == level.size) << i;
    shifted |= static_cast<uint32_t>(level.shift() != 0) << i;
  }
  for (uint32_t left = shifted; left; left &= left - 1) {
    const int32_t i = __builtin_ctz(left), k = tables.level[level_of(tables, index[i])].shift();
    const uint32_t raw = d.x[i] & ((1u << k) - 1), x = d.x[i] >> k;
    d.x[i] = d.refill ? refilled(x, d.words) : x;
    symbols[i] = static_cast<int32_t>((static_cast<uint32_t>(symbols[i]) << k) + raw - half_of(k));
  }
  for (; escaped; escaped &= escaped - 1) {
    const int32_t i = __builtin_ctz(escaped);
    mend(tables, index[i], d.escapes->next(), symbols + i);
  }
}

template <class Index>
void decode(Decoding& d, const Index* index, int32_t* symbols, int64_t count) {
  for (; count > 0; count -= d.lanes, index += d.lanes, symbols += d.lanes) {
    decode_row(d, index, symbols, count < d.lanes ? static_cast<int32_t>(count) : d.lanes);
  }
}

template <class Index>
inline Coded coded(const Tables& tables, const Index* index, int64_t i, int32_t symbol) {
  return rans::coded(tables, tables.level[level_of(tables, index[i])], symbol);
}

inline uint32_t put(uint32_t x, bool too_large, uint16_t*& words) {
  if (!too_large) return x;
  *--words = static_cast<uint16_t>(x);
  return x >> kWordBits;
}

// A source is what tells how elements are coded: a pointer to their indexes, or Mixtures.
template <class TableSet, class Source>
void encode_row(EncodingOf<TableSet>& e, Source source, const int32_t* symbols, int32_t active) {
  const TableSet& tables = *e.tables;
  const int32_t n = tables.precision;
  Coded row[kMostLanes];
  for (int32_t i = active - 1; i >= 0; --i) {
    row[i] = coded(tables, source, i, symbols[i]);
    if (row[i].escaped) e.escapes->put(row[i].value);
    const int32_t k = row[i].shift;
    if (k) e.x[i] = put(e.x[i], e.x[i] >> (32 - k) != 0, e.words) << k | row[i].raw;
  }
  for (int32_t i = active - 1; i >= 0; --i) {
    const uint32_t f = row[i].frequency, x = put(e.x[i], e.x[i] >> (32 - n) >= f, e.words);
    const uint32_t quotient = x / f;
    e.x[i] = (quotient << n) + (x - quotient * f) + row[i].start;
  }
}

// Elements [0, count), from the last row to the first.
template <class TableSet, class Source>
void encode(EncodingOf<TableSet>& e, Source source, const int32_t* symbols, int64_t count) {
  for (int64_t first = (count - 1) / e.lanes * e.lanes; first >= 0; first -= e.lanes) {
    const int64_t left = count - first;
    encode_row(e, source + first, symbols + first, left < e.lanes ? static_cast<int32_t>(left) : e.lanes);
  }
}

// Codes a row of the tail; false where it does not belong to it: the states and escapes are then as before.
template <class TableSet, class Source>
bool encode_tail_row(EncodingOf<TableSet>& e, Source source, const int32_t* symbols, int32_t active) {
  const TableSet& tables = *e.tables;
  uint32_t x[kMostLanes];
  Coded row[kMostLanes];
  for (int32_t i = 0; i < active; ++i) {
    row[i] = coded(tables, source, i, symbols[i]);
    const uint64_t before = (static_cast<uint64_t>(e.x[i]) << row[i].shift) | row[i].raw;
    const uint64_t after = (before / row[i].frequency << tables.precision) + before % row[i].frequency + row[i].start;
    if (after >= 0xFFFF0000u) return false;
    x[i] = static_cast<uint32_t>(after);
  }
  for (int32_t i = active - 1; i >= 0; --i) {
    e.x[i] = x[i];
    if (row[i].escaped) e.escapes->put(row[i].value);
  }
  return true;
}

}  // namespace lic_fast::rans::scalar
