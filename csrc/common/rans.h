// The arithmetic of docs/BITSTREAM.md that every implementation shares, on the host and on devices: states, values,
// look-ups.
//
// Free of torch. Tables are packed by lic_fast/ops/rans_coder.py; `open` says how they lie in memory.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/choose.h"

namespace lic_fast::rans {

constexpr int32_t kWordBits = 16;
constexpr uint32_t kLow = 1u << kWordBits;  // states are at or above it before the tail
constexpr int32_t kMostLanes = 32;          // of a stream
constexpr int32_t kMostTailRows = 256;
constexpr int32_t kBucketBits = 8;
constexpr int32_t kMostShift = 15;
constexpr int32_t kLadderFirst = 1980;  // the upper 13 bits of the smallest scale of the ladder
constexpr int32_t kLadderLevels = 244;

// A level: its row in bits 0-11, its shift in bits 12-15, the row's offset in the high half.
struct Level {
  uint32_t key;
  uint32_t size;  // of the row: its symbols, and the escape's number

  LIC_FAST_ANYWHERE uint32_t row() const { return key & 0xFFFu; }
  LIC_FAST_ANYWHERE int32_t shift() const { return static_cast<int32_t>(key >> 12 & 15u); }
  LIC_FAST_ANYWHERE int32_t offset() const { return static_cast<int32_t>(key) >> 16; }
};

struct Tables {
  int32_t precision;
  int32_t levels;
  int32_t ladder;      // the first level that scales select, or -1
  int32_t stride;      // entries of a row in `starts`
  const Level* level;  // [levels], then zeros up to a multiple of 256 levels
  const uint16_t*
      starts;  // [row][stride]: the start of each symbol and of the escape, then 2^precision, 3 times at least
  const uint8_t* bucket;  // [row][256]: the symbol that holds the first slot of the bucket
};

constexpr int64_t kTablesHeader = 8;  // 64-bit words: precision, rows, levels, stride, ladder, hash, 0, 0

// Whether `words` 64-bit words hold the sections that their header announces. Padding lets vectors read a little
// beyond.
LIC_FAST_ANYWHERE bool open(const int64_t* packed, int64_t words, Tables* tables) {
  if (words < kTablesHeader) return false;
  const int64_t precision = packed[0], rows = packed[1], levels = packed[2], stride = packed[3], ladder = packed[4];
  if (precision < 10 || precision > 15 || rows < 1 || rows > 4000 || levels < 1 || levels > 65536 || stride < 4 ||
      stride > 512 || stride % 4 || ladder < -1 || (ladder >= 0 && ladder > levels - kLadderLevels)) {
    return false;
  }
  const int64_t at_starts = kTablesHeader + (levels + 255) / 256 * 256, at_bucket = at_starts + rows * stride / 4 + 1;
  if (words != at_bucket + rows * (1 << kBucketBits) / 8 + 1) return false;
  *tables = {static_cast<int32_t>(precision),
             static_cast<int32_t>(levels),
             static_cast<int32_t>(ladder),
             static_cast<int32_t>(stride),
             reinterpret_cast<const Level*>(packed + kTablesHeader),
             reinterpret_cast<const uint16_t*>(packed + at_starts),
             reinterpret_cast<const uint8_t*>(packed + at_bucket)};
  return true;
}

// The level of a scale by its bits, counted from the ladder's first: integers only.
LIC_FAST_ANYWHERE int32_t rung(float scale) {
  int32_t bits;
  memcpy(&bits, &scale, sizeof bits);
  const int32_t key = (bits >> 19) - kLadderFirst;
  return key < 0 ? 0 : key < kLadderLevels ? key : kLadderLevels - 1;
}

// Indexes are levels, or scales that select one.
LIC_FAST_ANYWHERE int32_t level_of(const Tables& tables, float scale) { return tables.ladder + rung(scale); }
LIC_FAST_ANYWHERE int32_t level_of(const Tables&, uint8_t index) { return index; }
LIC_FAST_ANYWHERE int32_t level_of(const Tables&, int32_t index) { return index; }

// How elements are dealt out, and which are left out.
struct Layout {
  int64_t lanes;
  int64_t streams;
  int64_t skip;
};

struct Share {
  int64_t first, count;
};

LIC_FAST_ANYWHERE Share share_of(int64_t elements, const Layout& layout, int64_t stream) {
  const int64_t rows = (elements + layout.lanes - 1) / layout.lanes;
  const int64_t each = (rows + layout.streams - 1) / layout.streams * layout.lanes;
  const int64_t first = stream * each < elements ? stream * each : elements;
  return {first, elements - first < each ? elements - first : each};
}

LIC_FAST_ANYWHERE bool skipped(const Tables& tables, int32_t level, int64_t skip) {
  const auto unchecked = static_cast<uint32_t>(level);  // nobody has looked at it yet: no signed difference
  return unchecked - static_cast<uint32_t>(tables.ladder) < static_cast<uint32_t>(skip);
}

// What is added to a symbol before its low bits are split off.
LIC_FAST_ANYWHERE uint32_t half_of(int32_t shift) { return (1u << shift) >> 1; }

struct Symbol {
  uint32_t start;
  uint32_t frequency;
  uint32_t number;  // in its row
};

// The symbol of a slot. The search ends: a row's last entries are 2^precision, which no slot reaches.
LIC_FAST_ANYWHERE Symbol find(const Tables& tables, const Level& level, uint32_t slot) {
  const uint16_t* starts = tables.starts + level.row() * tables.stride;
  uint32_t j = tables.bucket[(level.row() << kBucketBits) + (slot >> (tables.precision - kBucketBits))];
  while (slot >= starts[j + 1]) ++j;
  return {starts[j], static_cast<uint32_t>(starts[j + 1] - starts[j]), j};
}

// The same from four starts that are read at once: the loop is seldom entered, where a search stalls a whole warp.
LIC_FAST_ANYWHERE Symbol find_ahead(const Tables& tables, const Level& level, uint32_t slot) {
  const uint32_t first = tables.bucket[(level.row() << kBucketBits) + (slot >> (tables.precision - kBucketBits))];
  const uint16_t* at = tables.starts + level.row() * tables.stride + first;
  const uint32_t a = at[0], b = at[1], c = at[2], d = at[3];
  const bool past1 = slot >= b, past2 = slot >= c;
  uint32_t start = past2 ? c : past1 ? b : a, end = past2 ? d : past1 ? c : b, j = past1 + past2;
  while (slot >= end) start = end, end = at[++j + 1];
  return {start, end - start, first + j};
}

LIC_FAST_ANYWHERE uint32_t taken(uint32_t x, const Symbol& symbol, uint32_t slot, int32_t precision) {
  return symbol.frequency * (x >> precision) + slot - symbol.start;
}

// What an element is coded as.
struct Coded {
  uint32_t start, frequency, raw;
  int32_t shift, value;
  bool escaped;
};

LIC_FAST_ANYWHERE Coded coded(const Tables& tables, const Level& level, int32_t symbol) {
  const uint32_t t = static_cast<uint32_t>(symbol) + half_of(level.shift());
  const int32_t value = static_cast<int32_t>(t) >> level.shift();
  const uint32_t number = static_cast<uint32_t>(value) - static_cast<uint32_t>(level.offset());
  const bool escaped = number >= level.size;
  const uint16_t* start = tables.starts + level.row() * tables.stride + (escaped ? level.size : number);
  return {start[0], static_cast<uint32_t>(start[1] - start[0]), t & ((1u << level.shift()) - 1), level.shift(), value,
          escaped};
}

// What is asked of the number that a slot was found to have: its value, whether it is an escape; and what a value and
// plain bits make.
LIC_FAST_ANYWHERE uint32_t value_of(const Level& level, uint32_t number) {
  return number + static_cast<uint32_t>(level.offset());
}
LIC_FAST_ANYWHERE bool is_escape(const Level& level, uint32_t number) { return number == level.size; }
LIC_FAST_ANYWHERE int32_t joined(const Level& level, uint32_t value, uint32_t raw) {
  return static_cast<int32_t>((value << level.shift()) + raw - half_of(level.shift()));
}

}  // namespace lic_fast::rans
