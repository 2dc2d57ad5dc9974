// What is done to a valid container: cut, flipped, spliced, its numbers edited, its header set to extremes.
#pragma once

#include "rans_samples.h"

namespace lic_fast::rans::fuzz {

// The head, where most of the meaning is, is hit more often; the magic, which is all the same, seldom.
inline int64_t place(Random& random, const Bytes& bytes) {
  const auto size = static_cast<int64_t>(bytes.size());
  const int64_t at = random.below(std::min(size, random.one_of<int64_t>({60, 200, size, size})));
  return at < 3 && size > 6 && !random.once_in(8) ? at + 3 : at;
}

inline void flip(Random& random, Bytes* bytes) {
  for (int64_t i = random.one_of<int64_t>({1, 1, 2, 8, 40}); i > 0; --i) {
    (*bytes)[place(random, *bytes)] ^= static_cast<uint8_t>(1 << random.below(8));
  }
}

inline void overwrite(Random& random, Bytes* bytes) {
  const auto value = random.one_of<uint8_t>({0, 1, 127, 128, 254, 255, static_cast<uint8_t>(random.next())});
  const int64_t at = place(random, *bytes), count = random.one_of<int64_t>({1, 1, 4, 64});
  for (int64_t i = at; i < std::min<int64_t>(at + count, bytes->size()); ++i) (*bytes)[i] = value;
}

inline void truncate(Random& random, Bytes* bytes) { bytes->resize(random.below(bytes->size())); }

inline void erase(Random& random, Bytes* bytes) {
  const int64_t at = place(random, *bytes);
  bytes->erase(bytes->begin() + at, bytes->begin() + std::min<int64_t>(at + random.between(1, 9), bytes->size()));
}

inline void insert(Random& random, Bytes* bytes) {
  Bytes more(random.between(1, 9));
  for (uint8_t& byte : more) byte = static_cast<uint8_t>(random.next());
  bytes->insert(bytes->begin() + (random.once_in(4) ? bytes->size() : place(random, *bytes)), more.begin(), more.end());
}

inline void splice(Random& random, const Bytes& other, Bytes* bytes) {
  const int64_t at = place(random, *bytes), from = random.once_in(2) ? at : place(random, other);
  bytes->resize(at);
  bytes->insert(bytes->end(), other.begin() + std::min<int64_t>(from, other.size()), other.end());
}

// Replaces one of the varints from `at` on by another, which may be of another length, or not in its shortest form.
inline void edit_number(Random& random, int64_t at, Bytes* bytes) {
  const auto size = static_cast<int64_t>(bytes->size());
  const auto end_of = [&](int64_t from) {
    while (from < size && (*bytes)[from] > 127) ++from;
    return std::min(from + 1, size);
  };
  for (int64_t i = random.one_of<int64_t>({0, 1, 2, random.below(6), random.below(30)}); i > 0; --i) at = end_of(at);
  if (at >= size) return;
  const int64_t end = end_of(at);
  uint64_t now = 0;
  for (int64_t i = std::min(end, at + 8) - 1; i >= at; --i) now = now << 7 | ((*bytes)[i] & 127u);
  const int64_t most = kMostElements;
  const auto value = random.one_of<uint64_t>({now + 1, now - (now > 0), 2 * now, now / 2, 0, 1, 127, 128, 255, 4096,
                                              4097, uint64_t{1} << random.below(50), static_cast<uint64_t>(most),
                                              static_cast<uint64_t>(most) + 1, ~uint64_t{0} >> 8, ~uint64_t{0}});
  Bytes number;
  put_number(&number, value);
  if (random.once_in(16)) {
    number.back() |= 128;
    number.push_back(0);
  }
  bytes->erase(bytes->begin() + at, bytes->begin() + end);
  bytes->insert(bytes->begin() + at, number.begin(), number.end());
}

// Magic, version, profile, flags, hash or skip.
inline void edit_field(Random& random, Bytes* bytes) {
  const int64_t at = random.one_of<int64_t>({0, 3, 4, 4, 5, 5, 5, 5, 5, 6, 14, 14});
  if (at >= static_cast<int64_t>(bytes->size())) return;
  const auto flags = static_cast<uint8_t>(random.below(6) | (random.below(4) << 3));  // valid ones
  (*bytes)[at] = at == 5 && random.once_in(2) ? flags : random.one_of<uint8_t>({0, 1, 2, 5, 6, 7, 244, 245, 255});
}

// As long as the header says, where it can be read: what follows from edited numbers is then decoded, not only refused.
inline void fit(Random& random, Bytes* bytes) {
  Opened opened;
  const auto size = static_cast<int64_t>(bytes->size());
  open(bytes->data(), size, false, &opened);
  if (opened.head.bytes <= 0 || opened.head.bytes > size + 4096) return;
  bytes->resize(opened.head.bytes);
  for (auto i = static_cast<size_t>(size); i < bytes->size(); ++i) (*bytes)[i] = static_cast<uint8_t>(random.next());
}

// One to four of these, at random.
inline void mutate(Random& random, const Sample& sample, const Bytes& other, Bytes* bytes) {
  for (int64_t i = random.one_of<int64_t>({1, 1, 1, 2, 4}); i > 0 && !bytes->empty(); --i) {
    switch (random.below(10)) {
      case 0: truncate(random, bytes); break;
      case 1: erase(random, bytes); break;
      case 2: insert(random, bytes); break;
      case 3: splice(random, other, bytes); break;
      case 4: overwrite(random, bytes); break;
      case 5:
      case 6: edit_number(random, sample.numbers_at, bytes); break;
      case 7: edit_field(random, bytes); break;
      default: flip(random, bytes);
    }
  }
  if (random.once_in(2)) fit(random, bytes);
}

// Mixtures other than those that the container was made with: planes reversed or shifted, or one word beyond a limit.
inline void make_others(Random& random, MixtureWords& mixtures) {
  if (mixtures.count == 0) return;
  const bool reversed = random.once_in(2), spoilt = random.once_in(2);
  const int64_t by = random.below(mixtures.count), at = random.below(mixtures.count);
  for (int64_t p = 0; p < mixtures.planes(); ++p) {
    int32_t *const first = mixtures.plane(p), *const end = first + mixtures.count;
    reversed ? std::reverse(first, end) : static_cast<void>(std::rotate(first, first + by, end));
  }
  if (!spoilt) return;
  const int64_t k = random.below(mixtures.components);
  int32_t &range = mixtures.plane(1)[at], &mean = mixtures.plane(2 + 2 * k)[at], &form = mixtures.plane(3 + 2 * k)[at];
  const auto any = static_cast<int32_t>(random.next());
  switch (random.below(4)) {
    case 0: range = (range & ~0xFFF) | random.one_of({0, kMostRange + 1, 0xFFF}); break;
    case 1: mean = random.one_of({kMostMean + 1, -kMostMean - 1, INT32_MIN, INT32_MAX}); break;
    case 2: form = any; break;
    default: range = any;
  }
}

// Indexes, likewise.
template <class Index>
void make_others(Random& random, std::vector<Index>& index) {
  if (index.empty()) return;
  if (random.once_in(2)) {
    std::reverse(index.begin(), index.end());
  } else {
    std::rotate(index.begin(), index.begin() + random.below(index.size()), index.end());
  }
  auto& one = index[random.below(index.size())];
  if constexpr (std::is_same_v<Index, int32_t>) {
    one = random.one_of<int32_t>({one, -1, INT32_MIN, INT32_MAX, 65536});
  } else if constexpr (std::is_same_v<Index, uint8_t>) {
    one = random.one_of<uint8_t>({one, 255});
  } else {
    const uint32_t bits = random.one_of<uint32_t>({0, 0x80000000u, 0x7F800000u, 0x7FC00000u, 0xFFFFFFFFu, 1u});
    std::memcpy(&one, &bits, sizeof one);
  }
}

// Other indexes than those the container was made with: reversed, shifted, or one of them outside of the tables.
inline Indexes other_indexes(Random& random, Indexes indexes) {
  if (auto* mixtures = std::get_if<MixtureWords>(&indexes)) {
    make_others(random, *mixtures);
    return indexes;
  }
  std::visit(
      [&](auto& index) {
        if constexpr (!std::is_same_v<std::decay_t<decltype(index)>, MixtureWords>) make_others(random, index);
      },
      indexes);
  return indexes;
}

}  // namespace lic_fast::rans::fuzz
