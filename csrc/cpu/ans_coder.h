// The rANS coder of CompressAI's bitstreams on packed tables; free of torch, so that it can be fuzzed alone.
//
// 64-bit state, 32-bit words, 16-bit probabilities; the last symbol of a row is an escape, after which the value
// follows in nibbles of 4 bits: how many there are, then the value from its low end. One lane, so a symbol costs the
// latency of its chain: decoding looks the symbol up by the top bits of the state's low half (a bucket holds at most
// 128 symbols, on average less than one boundary) and multiplies once; encoding divides by an exact reciprocal. Nothing
// in a stream or in the indexes is trusted: no word is read past the end, and no loop is longer than 128.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace lic_fast::ans {

constexpr uint64_t kLow = uint64_t{1} << 31;  // states are in [2^31, 2^63) between symbols
constexpr int32_t kProbabilityBits = 16;
constexpr int32_t kNibbleBits = 4;
constexpr int32_t kMostNibbles = 8;  // of a 32-bit value

// The packed tables are written by lic_fast/ops/ans_coder.py, whose `pack` says what each field holds.
struct Row {
  int32_t offset;
  int32_t escape;         // the last symbol
  uint32_t first_symbol;  // of the row, in `encoding` and `decoding`
  uint32_t first_bucket;
  uint32_t bucket_shift;
  uint32_t unused;
};

struct Encoding {
  uint64_t reciprocal;
  uint32_t bias;
  uint16_t complement;  // 2^16 - frequency
  uint16_t shift;
};

struct Decoding {
  uint16_t start;
  uint16_t last;  // frequency - 1
};

struct Tables {
  int64_t rows;
  const Row* row;
  const Encoding* encoding;
  const Decoding* decoding;  // one more than there are symbols
  const uint16_t* bucket;    // the first symbol of which a part lies in the bucket
};

constexpr int64_t kHeader = 4;  // 64-bit words: rows, symbols, buckets, 0

// Whether `words` 64-bit words hold the sections that their header announces.
inline bool open(const int64_t* packed, int64_t words, Tables* tables) {
  if (words < kHeader) return false;
  const int64_t rows = packed[0], symbols = packed[1], buckets = packed[2];
  constexpr int64_t kMost = int64_t{1} << 32;
  if (rows < 1 || symbols < 1 || buckets < 1 || rows > kMost || symbols > kMost || buckets > kMost) return false;
  const int64_t at_encoding = kHeader + 3 * rows, at_decoding = at_encoding + 2 * symbols;
  const int64_t at_bucket = at_decoding + symbols / 2 + 1;
  if (words != at_bucket + (buckets + 3) / 4) return false;
  *tables = {
      rows, reinterpret_cast<const Row*>(packed + kHeader), reinterpret_cast<const Encoding*>(packed + at_encoding),
      reinterpret_cast<const Decoding*>(packed + at_decoding), reinterpret_cast<const uint16_t*>(packed + at_bucket)};
  return true;
}

enum Status : int64_t { kDone = 0, kIndexOutside = 1, kRanOut = 2, kMalformed = 3 };

// Words written from the last to the first.
class Words {
 public:
  explicit Words(int64_t room) : words_(room), at_(room) {}

  void reserve(int64_t count) {
    if (at_ < count) grow(count);
  }
  void put(uint64_t state) { words_[--at_] = static_cast<uint32_t>(state); }
  const uint32_t* data() const { return words_.data() + at_; }
  int64_t size() const { return static_cast<int64_t>(words_.size()) - at_; }

 private:
  __attribute__((noinline)) void grow(int64_t count) {
    const int64_t used = size(), room = 2 * static_cast<int64_t>(words_.size()) + count;
    std::vector<uint32_t> larger(room);
    std::memcpy(larger.data() + (room - used), data(), used * sizeof(uint32_t));
    words_.swap(larger);
    at_ = room - used;
  }

  std::vector<uint32_t> words_;
  int64_t at_;
};

inline uint64_t high_product(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
}

inline uint64_t put_nibble(uint64_t x, uint32_t nibble, Words& out) {
  if (x >= kLow >> kProbabilityBits << 32 << (kProbabilityBits - kNibbleBits)) {
    out.put(x);
    x >>= 32;
  }
  return (x << kNibbleBits) | nibble;
}

// What follows an escape, last nibble first, as the decoder reads it the other way round.
__attribute__((noinline)) inline uint64_t put_value(uint64_t x, uint32_t raw, Words& out) {
  int32_t nibbles = 0;
  while (nibbles < kMostNibbles && (raw >> (kNibbleBits * nibbles)) != 0) ++nibbles;
  for (int32_t j = nibbles - 1; j >= 0; --j) x = put_nibble(x, (raw >> (kNibbleBits * j)) & 15u, out);
  return put_nibble(x, static_cast<uint32_t>(nibbles), out);
}

// The words of the stream; differences wrap, so that every 32-bit symbol has a code whatever the offset.
inline Status encode(const int32_t* symbols, const int32_t* indexes, int64_t n, const Tables& tables, Words& out) {
  constexpr int64_t kMostWords = 2 + kMostNibbles;  // of one symbol
  uint64_t x = kLow;
  for (int64_t i = n - 1; i >= 0; --i) {
    const uint32_t index = static_cast<uint32_t>(indexes[i]);
    if (index >= static_cast<uint64_t>(tables.rows)) return kIndexOutside;
    const Row& row = tables.row[index];
    out.reserve(kMostWords);
    const uint32_t value = static_cast<uint32_t>(symbols[i]) - static_cast<uint32_t>(row.offset);
    uint32_t s = value;
    if (value >= static_cast<uint32_t>(row.escape)) {  // negative, or not in the table
      s = static_cast<uint32_t>(row.escape);
      x = put_value(x, value >> 31 ? ~(value << 1) : (value - s) << 1, out);
    }
    const Encoding e = tables.encoding[row.first_symbol + s];
    if (x >= (uint64_t{65536} - e.complement) << 47) {
      out.put(x);
      x >>= 32;
    }
    x += e.bias + (high_product(x, e.reciprocal) >> e.shift) * e.complement;
  }
  out.reserve(2);
  out.put(x >> 32);
  out.put(x);
  return kDone;
}

struct Reader {
  const uint8_t* data;
  int64_t words;
  int64_t at;

  // Fills the state where it has run low; false where no word is left.
  bool refill(uint64_t& x) {
    if (x < kLow) {
      if (at >= words) return false;
      uint32_t word;
      std::memcpy(&word, data + 4 * at++, sizeof word);
      x = (x << 32) | word;
    }
    return true;
  }
  bool nibble(uint64_t& x, uint32_t* value) {
    *value = static_cast<uint32_t>(x) & 15u;
    x >>= kNibbleBits;
    return refill(x);
  }
};

// The value that follows an escape, as the difference from the row's offset.
__attribute__((noinline)) inline Status get_value(Reader& in, uint64_t& x, int32_t escape, uint32_t* value) {
  uint32_t nibbles, raw = 0, nibble;
  if (!in.nibble(x, &nibbles)) return kRanOut;
  if (nibbles > kMostNibbles) return kMalformed;
  for (uint32_t j = 0; j < nibbles; ++j) {
    if (!in.nibble(x, &nibble)) return kRanOut;
    raw |= nibble << (kNibbleBits * j);
  }
  *value = raw & 1u ? ~(raw >> 1) : (raw >> 1) + static_cast<uint32_t>(escape);
  return kDone;
}

// state, at: where the last call left off; written where all n symbols decode.
inline Status decode(const uint8_t* stream, int64_t bytes, uint64_t* state, int64_t* at, const int32_t* indexes,
                     int64_t n, const Tables& tables, int32_t* symbols) {
  Reader in{stream, bytes / 4, *at};
  if (in.at < 0 || in.at > in.words) return kRanOut;
  uint64_t x = *state;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t index = static_cast<uint32_t>(indexes[i]);
    if (index >= static_cast<uint64_t>(tables.rows)) return kIndexOutside;
    const Row& row = tables.row[index];
    const Decoding* symbol = tables.decoding + row.first_symbol;
    const uint32_t slot = static_cast<uint32_t>(x) & 0xFFFFu;
    uint32_t s = tables.bucket[row.first_bucket + (slot >> row.bucket_shift)];
    while (slot - symbol[s].start > symbol[s].last) ++s;
    const uint32_t offset = slot - symbol[s].start;
    x = (x >> kProbabilityBits) * (uint64_t{symbol[s].last} + 1) + offset;
    if (!in.refill(x)) return kRanOut;
    uint32_t value = s;
    if (s == static_cast<uint32_t>(row.escape)) {
      const Status status = get_value(in, x, row.escape, &value);
      if (status != kDone) return status;
    }
    symbols[i] = static_cast<int32_t>(value + static_cast<uint32_t>(row.offset));
  }
  *state = x;
  *at = in.at;
  return kDone;
}

}  // namespace lic_fast::ans
