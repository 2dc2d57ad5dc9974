// The container of docs/BITSTREAM.md, section 6: opened into states that a decoder goes on from, and written.
//
// Free of torch, host only. Nothing in a container is trusted: every size is checked against the bytes that are there
// before anything is allocated or read.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "common/crc32c.h"
#include "common/rans_state.h"

namespace lic_fast::rans {

constexpr uint8_t kVersionNumber = 1;
constexpr int64_t kMostStreams = 4096;
constexpr int64_t kMostElements = int64_t{1} << 48;
constexpr int64_t kCheckBytes = 4;

struct Opened {
  ContainerState head{};
  std::vector<StreamState> streams;
};

namespace detail {

class Reader {
 public:
  Reader(const uint8_t* data, int64_t bytes) : data_(data), bytes_(bytes) {}
  int64_t at() const { return at_; }
  Status byte(int64_t* value) {
    if (at_ >= bytes_) return kTruncated;
    *value = data_[at_++];
    return kDone;
  }
  Status number(int64_t most, int64_t* value) {
    uint64_t sum = 0;
    for (int32_t shift = 0; shift < 56; shift += 7) {
      int64_t part;
      if (const Status status = byte(&part); status != kDone) return status;
      sum |= static_cast<uint64_t>(part & 127) << shift;
      if (part < 128) {
        *value = static_cast<int64_t>(sum);
        return (shift && part == 0) || *value > most ? kNumber : kDone;
      }
    }
    return kNumber;
  }

 private:
  const uint8_t* data_;
  int64_t bytes_, at_ = 0;
};

inline uint32_t bits_at(const uint8_t* data, int64_t bit, int32_t count) {
  uint64_t value = 0;
  for (int64_t byte = bit / 8; byte * 8 < bit + count; ++byte) value |= uint64_t{data[byte]} << (byte - bit / 8) * 8;
  return static_cast<uint32_t>(value >> (bit % 8)) & static_cast<uint32_t>((uint64_t{1} << count) - 1);
}

#define LIC_FAST_TRY(expression) \
  if (const Status status_ = (expression); status_ != kDone) return status_

inline Status read_head(Reader& in, const uint8_t* data, int64_t bytes, ContainerState* head) {
  if (bytes < 14) return bytes >= 3 && std::memcmp(data, "LFR", 3) != 0 ? kForeign : kTruncated;
  if (std::memcmp(data, "LFR", 3) != 0) return kForeign;
  int64_t value, flags;
  for (int32_t i = 0; i < 3; ++i) in.byte(&value);
  in.byte(&value);
  if (value != kVersionNumber) return kVersion;
  in.byte(&head->profile);
  if (head->profile > 1) return kProfile;
  in.byte(&flags);
  if (flags >> 5 || (flags & 7) > 5 || (head->profile == 1 && flags & 8)) return kFlags;
  head->lanes = int64_t{1} << (flags & 7);
  for (int32_t i = 0; i < 8; ++i) {
    in.byte(&value);
    head->table_hash |= static_cast<uint64_t>(value) << 8 * i;
  }
  if (flags & 8) {
    LIC_FAST_TRY(in.byte(&head->skip));
    if (head->skip < 1 || head->skip > kLadderLevels) return kImpossible;
  }
  LIC_FAST_TRY(in.number(kMostStreams, &head->streams));
  if (head->streams < 1) return kImpossible;
  if (flags & 16) {
    head->dimensions = -1;
    LIC_FAST_TRY(in.number(kMostElements, &head->steps));
    return in.number(kMostElements, &head->elements);
  }
  LIC_FAST_TRY(in.number(kMostDimensions, &head->dimensions));
  head->elements = 1;
  for (int64_t i = 0; i < head->dimensions; ++i) {
    LIC_FAST_TRY(in.number(kMostElements, &head->shape[i]));
    if (head->shape[i] && head->elements > kMostElements / head->shape[i]) return kImpossible;
    head->elements *= head->shape[i];
  }
  return kDone;
}

inline Status read_directory(Reader& in, int64_t bytes, Opened* opened) {
  ContainerState& head = opened->head;
  if (in.at() + 3 * head.streams > bytes) return kTruncated;  // what the directory takes at the least
  opened->streams.assign(head.streams, StreamState{});
  for (StreamState& stream : opened->streams) {
    LIC_FAST_TRY(in.number(head.elements, &stream.rows));
    LIC_FAST_TRY(in.number(2 * head.elements, &stream.words));
    LIC_FAST_TRY(in.number(head.elements, &stream.escapes));
    stream.escape_width = 1;
    if (stream.escapes) {
      LIC_FAST_TRY(in.byte(&stream.escape_width));
      if (stream.escape_width != 1 && stream.escape_width != 2 && stream.escape_width != 4) return kImpossible;
    }
  }
  return kDone;
}

// The states, and where the sections lie. A count is at most 2^49, so that no sum overflows before it is compared.
inline Status read_states(const uint8_t* data, int64_t bytes, int64_t at, Opened* opened) {
  ContainerState& head = opened->head;
  const int64_t lanes = head.streams * head.lanes, mantissas = at + (4 * lanes + 7) / 8;
  if (mantissas > bytes) return kTruncated;
  int64_t bit = 8 * mantissas;
  for (int64_t i = 0; i < lanes; ++i) bit += 16 + bits_at(data, 8 * at + 4 * i, 4);
  int64_t next = (bit + 7) / 8;
  if (next > bytes) return kTruncated;
  if (4 * lanes % 8 && data[mantissas - 1] >> 4) return kPadding;
  if (bit % 8 && data[next - 1] >> bit % 8) return kPadding;
  bit = 8 * mantissas;
  for (int64_t i = 0; i < lanes; ++i) {
    const int32_t width = 16 + static_cast<int32_t>(bits_at(data, 8 * at + 4 * i, 4));
    opened->streams[i / head.lanes].x[i % head.lanes] = (1u << width) | bits_at(data, bit, width);
    bit += width;
  }
  const int64_t padded = next + next % 2;
  const bool pad_is_there = padded > next && padded <= bytes;
  if (pad_is_there && data[next]) return kPadding;
  next = padded;
  for (StreamState& stream : opened->streams) {
    stream.word_at = next;
    next += 2 * stream.words;
    if (next > bytes) return kTruncated;
  }
  for (StreamState& stream : opened->streams) {
    stream.escape_at = next;
    next += stream.escape_width * stream.escapes;
    if (next > bytes) return kTruncated;
  }
  head.bytes = next + kCheckBytes;
  return head.bytes > bytes ? kTruncated : head.bytes < bytes ? kTrailing : kDone;
}

}  // namespace detail

// Opens a container. head.bytes is the length it should have, where that is known.
inline Status open(const uint8_t* data, int64_t bytes, bool check, Opened* opened) {
  detail::Reader in(data, bytes);
  LIC_FAST_TRY(detail::read_head(in, data, bytes, &opened->head));
  LIC_FAST_TRY(detail::read_directory(in, bytes, opened));
  LIC_FAST_TRY(detail::read_states(data, bytes, in.at(), opened));
  if (!check) return kDone;
  uint32_t stored = 0;
  for (int32_t i = 0; i < 4; ++i) stored |= static_cast<uint32_t>(data[bytes - 4 + i]) << 8 * i;
  return stored == crc32c(data, bytes - kCheckBytes) ? kDone : kCheck;
}

#undef LIC_FAST_TRY

// Everything before the words: `head` (magic to dimensions), directory, states, pad.
inline std::vector<uint8_t> write_head(const uint8_t* head, int64_t bytes, const Finished* streams, int64_t count,
                                       int64_t lanes) {
  std::vector<uint8_t> out(head, head + bytes);
  const auto number = [&out](uint64_t value) {
    for (; value > 127; value >>= 7) out.push_back(static_cast<uint8_t>(value) | 128);
    out.push_back(static_cast<uint8_t>(value));
  };
  for (int64_t w = 0; w < count; ++w) {
    number(streams[w].rows);
    number(streams[w].words);
    number(streams[w].escapes);
    if (streams[w].escapes) out.push_back(static_cast<uint8_t>(streams[w].escape_width));
  }
  uint64_t bits = 0;
  int32_t held = 0;
  const auto put = [&](uint32_t value, int32_t width) {
    bits |= static_cast<uint64_t>(value) << held;
    for (held += width; held >= 8; held -= 8, bits >>= 8) out.push_back(static_cast<uint8_t>(bits));
  };
  const auto flush = [&] {
    if (held) out.push_back(static_cast<uint8_t>(bits));
    bits = 0, held = 0;
  };
  const auto exponent = [](uint32_t x) { return 31 - __builtin_clz(x); };
  for (int64_t i = 0; i < count * lanes; ++i) put(exponent(streams[i / lanes].x[i % lanes]) - 16, 4);
  flush();
  for (int64_t i = 0; i < count * lanes; ++i) {
    const uint32_t x = streams[i / lanes].x[i % lanes];
    put(x - (1u << exponent(x)), exponent(x));
  }
  flush();
  if (out.size() % 2) out.push_back(0);
  return out;
}

}  // namespace lic_fast::rans
