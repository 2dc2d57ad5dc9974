// Blocks of rows of one stream: what rans_scalar.h, rans_avx2.h and rans_avx512.h all provide.
//
// A block is up to kBlockRows rows; only its last row may be partial. Its caller has made sure that the words a block
// can take or put fit: a decoder may read kBlockWords + kSlack words from `words`, an encoder has room for as many
// before it.
#pragma once

#include "common/rans.h"
#include "common/rans_mixture.h"

namespace lic_fast::rans {

constexpr int64_t kBlockRows = 64;
constexpr int64_t kBlockWords = 2 * kBlockRows * kMostLanes;
constexpr int64_t kSlack = 32;

// The escape values of a stream, in the order in which they are taken. Past the end they are 0, and `at` runs on.
struct Escapes {
  const uint8_t* data = nullptr;
  int64_t count = 0;
  int64_t at = 0;
  int32_t width = 1;

  int32_t next() {
    const int64_t i = at++;
    if (i >= count) return 0;
    const uint8_t* p = data + i * width;
    if (width == 1) return static_cast<int8_t>(*p);
    if (width == 2) return static_cast<int16_t>(p[0] | p[1] << 8);
    return static_cast<int32_t>(p[0] | p[1] << 8 | p[2] << 16 | static_cast<uint32_t>(p[3]) << 24);
  }
};

template <class TableSet>
struct DecodingOf {
  const TableSet* tables;
  int32_t lanes;
  bool refill;           // false in the tail
  const uint8_t* words;  // the next word, anywhere in memory
  uint32_t* x;           // [lanes]
  Escapes* escapes;
};
using Decoding = DecodingOf<Tables>;

// Escape values from the last to the first.
class EscapeSink {
 public:
  ~EscapeSink() { delete[] values_; }
  EscapeSink() = default;
  EscapeSink(const EscapeSink&) = delete;
  EscapeSink& operator=(const EscapeSink&) = delete;

  __attribute__((noinline)) void put(int32_t value) {
    if (size_ == room_) grow();
    values_[size_++] = value;
  }
  int64_t size() const { return size_; }
  int32_t from_last(int64_t i) const { return values_[size_ - 1 - i]; }

 private:
  void grow() {
    const int64_t room = 2 * room_ + 64;
    int32_t* larger = new int32_t[room];
    if (size_) std::memcpy(larger, values_, size_ * sizeof(int32_t));
    delete[] values_;
    values_ = larger;
    room_ = room;
  }
  int32_t* values_ = nullptr;
  int64_t size_ = 0, room_ = 0;
};

template <class TableSet>
struct EncodingOf {
  const TableSet* tables;
  int32_t lanes;
  uint16_t* words;  // one behind the place of the next word: words are put from the end to the front
  uint32_t* x;      // [lanes]
  EscapeSink* escapes;
};
using Encoding = EncodingOf<Tables>;

// Adds what an escaped element's value differs by from the one that the row's last symbol would have.
template <class Index>
inline void mend(const Tables& tables, Index index, int32_t value, int32_t* symbol) {
  const Level level = tables.level[level_of(tables, index)];
  const uint32_t taken_for = static_cast<uint32_t>(level.offset() + static_cast<int32_t>(level.size));
  *symbol = static_cast<int32_t>(static_cast<uint32_t>(*symbol) +
                                 ((static_cast<uint32_t>(value) - taken_for) << level.shift()));
}

// The escaped lanes of a row, in their order; and in the opposite one.
template <class Index>
__attribute__((noinline)) void mend_all(Decoding& d, const Index* index, int32_t* symbols, uint32_t escaped) {
  for (; escaped; escaped &= escaped - 1) {
    const int32_t i = __builtin_ctz(escaped);
    mend(*d.tables, index[i], d.escapes->next(), symbols + i);
  }
}

__attribute__((noinline)) inline void keep_all(EscapeSink& escapes, const int32_t* values, uint32_t escaped) {
  for (int32_t i = 31; i >= 0; --i) {
    if (escaped >> i & 1) escapes.put(values[i]);
  }
}

}  // namespace lic_fast::rans
