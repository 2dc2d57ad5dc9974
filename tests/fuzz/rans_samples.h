// Valid containers of many shapes, as lic_fast.coding would make them: random tables, indexes, symbols and layouts.
//
// All randomness comes from one small generator, so that a case is the same with every compiler and library.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <utility>
#include <variant>
#include <vector>

#include "cpu/rans_lockstep.h"

namespace lic_fast::rans::fuzz {

using Bytes = std::vector<uint8_t>;

// Integers of mixtures, plane after plane, not one more.
struct MixtureWords {
  std::vector<int32_t> words;
  int64_t count;
  int32_t components;

  int32_t* plane(int64_t p) { return words.data() + p * count; }
  int64_t planes() const { return 2 + 2 * components; }
};
using Indexes = std::variant<std::vector<float>, std::vector<uint8_t>, std::vector<int32_t>, MixtureWords>;

// What coders take.
template <class Index>
const Index* elements_of(const std::vector<Index>& indexes) {
  return indexes.data();
}
inline Mixtures elements_of(const MixtureWords& mixtures) {
  return {mixtures.words.data(), mixtures.count, mixtures.components};
}
template <class Index>
int64_t count_of(const std::vector<Index>& indexes) {
  return static_cast<int64_t>(indexes.size());
}
inline int64_t count_of(const MixtureWords& mixtures) { return mixtures.count; }

class Random {  // splitmix64
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  int64_t below(int64_t n) { return n > 1 ? static_cast<int64_t>(next() % static_cast<uint64_t>(n)) : 0; }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  bool once_in(int64_t n) { return below(n) == 0; }
  template <class T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[below(static_cast<int64_t>(values.size()))];
  }

 private:
  uint64_t state_;
};

// A table set in memory, as lic_fast/ops/rans_coder.py packs one, not a byte longer.
class TableSet {
 public:
  explicit TableSet(Random& random) {
    const int32_t precision = static_cast<int32_t>(random.one_of({10, 11, 14, 14, 15}));
    const int64_t rows = random.between(1, 6), levels = random.one_of<int64_t>({1, 40, 244, 256, 290});
    const int64_t ladder = levels < kLadderLevels ? -1 : random.one_of<int64_t>({-1, 0, levels - kLadderLevels});
    std::vector<int64_t> sizes(rows), offsets(rows);
    for (int64_t& size : sizes) size = random.one_of<int64_t>({0, 1, 2, 7, random.between(0, 255), 255});
    for (int64_t& offset : offsets) offset = random.between(-300, 300);
    const int64_t most = *std::max_element(sizes.begin(), sizes.end()), lines = (most + 4 + 31) / 32 | 1;
    const int64_t stride = 32 * lines, padded = (levels + 255) / 256 * 256;
    packed_.assign(kTablesHeader + padded + rows * stride / 4 + 1 + rows * 32 + 1, 0);
    const int64_t head[] = {precision, rows, levels, stride, ladder};
    std::copy(head, head + 5, packed_.begin());
    auto* level = reinterpret_cast<Level*>(packed_.data() + kTablesHeader);
    for (int64_t i = 0; i < levels; ++i) {
      const auto row = static_cast<uint32_t>(random.below(rows));
      const auto shift = random.one_of<uint32_t>({0, 0, 0, 1, 3, 8, 15});
      level[i] = {row | shift << 12 | static_cast<uint32_t>(offsets[row]) << 16, static_cast<uint32_t>(sizes[row])};
    }
    auto* starts = reinterpret_cast<uint16_t*>(packed_.data() + kTablesHeader + padded);
    auto* buckets = reinterpret_cast<uint8_t*>(packed_.data() + kTablesHeader + padded + rows * stride / 4 + 1);
    for (int64_t r = 0; r < rows; ++r)
      fill_row(random, precision, sizes[r], stride, starts + r * stride, buckets + 256 * r);
    good_ = open(packed_.data(), static_cast<int64_t>(packed_.size()), &tables_);
  }
  bool good() const { return good_; }
  const Tables& get() const { return tables_; }

 private:
  // Frequencies from 1: what is left goes to one symbol, evenly to all, or more to the middle.
  static void fill_row(Random& random, int32_t precision, int64_t size, int64_t stride, uint16_t* starts,
                       uint8_t* buckets) {
    const int64_t total = int64_t{1} << precision;
    std::vector<int64_t> frequencies(size + 1, 1);
    int64_t left = total - size - 1;
    const int64_t kind = random.below(3), heavy = random.below(size + 1);
    for (int64_t step = 0; kind && step <= size; ++step) {
      const int64_t at = kind == 1 ? step : (size / 2 + (step % 2 ? -1 : 1) * (step + 1) / 2 + size + 1) % (size + 1);
      const int64_t part = kind == 1 ? (total - size - 1) / (size + 1) : left / 3;
      frequencies[at] += part;
      left -= part;
    }
    frequencies[heavy] += left;
    std::fill(starts, starts + stride, static_cast<uint16_t>(total));
    int64_t start = 0;
    for (int64_t j = 0; j <= size; ++j) {
      starts[j] = static_cast<uint16_t>(start);
      const int64_t bucket = total >> kBucketBits, end = start + frequencies[j];
      for (int64_t b = (start + bucket - 1) / bucket; b * bucket < end; ++b) buckets[b] = static_cast<uint8_t>(j);
      start = end;
    }
  }

  std::vector<int64_t> packed_;
  Tables tables_{};
  bool good_ = false;
};

// A table of mixtures, likewise: half masses that rise evenly, by less and less, at once, or hardly.
class MixtureSet {
 public:
  explicit MixtureSet(Random& random) {
    packed_.assign(kMixtureWords, 0);
    packed_[0] = random.between(12, 16);
    packed_[3] = random.between(1, 15);
    uint32_t parts[2 * kEntries + 32] = {};  // entries, reach, quantiles
    const int64_t kind = random.below(4);
    uint32_t half = 0;
    for (int32_t i = 0; i < kEntries; ++i) {
      const uint32_t left = 65535 - half, few = static_cast<uint32_t>(random.below(4));
      const uint32_t slope = kind == 0 ? 65535 / kEntries : kind == 1 ? left / 5 : kind == 2 ? (i ? 0 : left) : few;
      parts[i] = half << 16 | slope;
      half += slope;
    }
    for (int32_t i = 0; i < 17; ++i) parts[kEntries + i] = static_cast<uint32_t>(random.below(257));
    for (int32_t i = 0; i < kEntries; ++i) {  // a search may begin anywhere
      parts[kEntries + 32 + i] = static_cast<uint32_t>(static_cast<int32_t>(random.between(-16384, 16384)));
    }
    std::memcpy(packed_.data() + kTablesHeader, parts, sizeof(int64_t) * (kMixtureWords - kTablesHeader));
    good_ = open(packed_.data(), static_cast<int64_t>(packed_.size()), &tables_);
  }
  bool good() const { return good_; }
  const MixtureTables& get() const { return tables_; }

 private:
  std::vector<int64_t> packed_;
  MixtureTables tables_{};
  bool good_ = false;
};

// A container and what it was made of.
struct Sample {
  Indexes indexes;
  std::vector<int32_t> symbols;
  std::vector<int64_t> steps;  // their elements; one-shot coding has one
  bool stepwise = false;
  Bytes bytes;
  int64_t numbers_at = 0;  // where the header's varints begin
};

inline void put_number(Bytes* out, uint64_t value) {
  for (; value > 127; value >>= 7) out->push_back(static_cast<uint8_t>(value) | 128);
  out->push_back(static_cast<uint8_t>(value));
}

inline void seal(Bytes* bytes) {
  const auto size = static_cast<int64_t>(bytes->size()) - kCheckBytes;
  const uint32_t check = size < 0 ? 0 : crc32c(bytes->data(), size);
  for (int64_t i = 0; size >= 0 && i < kCheckBytes; ++i) (*bytes)[size + i] = static_cast<uint8_t>(check >> 8 * i);
}

inline Variant random_variant(Random& random) {
  const Variant variant = random.one_of({kScalar, kAvx2, kAvx512Loads, kAvx512Gathers, kLockstep});
  return has(variant) ? variant : kScalar;
}

inline Indexes random_indexes(Random& random, const Tables& tables, int64_t n) {
  if (tables.ladder >= 0 && random.once_in(2)) {
    std::vector<float> scales(n);
    const int64_t octaves = random.one_of<int64_t>({1, 4, 16});
    for (float& scale : scales)
      scale = 0.1f * static_cast<float>(1 << random.below(octaves)) * (1 + random.below(16) / 16.0f);
    return scales;
  }
  if (random.once_in(2)) {
    std::vector<uint8_t> levels(n);
    for (uint8_t& level : levels) level = static_cast<uint8_t>(random.below(std::min(tables.levels, 256)));
    return levels;
  }
  std::vector<int32_t> levels(n);
  for (int32_t& level : levels) level = static_cast<int32_t>(random.below(tables.levels));
  return levels;
}

// Any that are allowed: every form, shift, size and hint, means up to their limits.
inline MixtureWords random_mixtures(Random& random, int64_t n) {
  const auto components = random.one_of<int32_t>({1, 2, 3, 3, 4, 5, 16});
  MixtureWords made{std::vector<int32_t>((2 + 2 * components) * n), n, components};
  const int64_t near = random.one_of<int64_t>({1000, 20000, 1 << 20});
  for (int64_t i = 0; i < n; ++i) {
    const int64_t size = random.one_of<int64_t>({random.between(1, 8), random.between(1, kMostRange), kMostRange});
    made.plane(0)[i] = static_cast<int32_t>(random.next() >> random.one_of<int32_t>({32, 56}));
    made.plane(1)[i] = static_cast<int32_t>(static_cast<uint32_t>(size) | static_cast<uint32_t>(random.next()) << 12);
    int64_t left = kWeights;
    for (int32_t k = 0; k < components; ++k) {
      const int64_t weight = k + 1 == components ? left : random.once_in(3) ? 0 : random.below(left + 1);
      const int64_t far = random.once_in(8) ? kMostMean : near;
      left -= weight;
      made.plane(2 + 2 * k)[i] = static_cast<int32_t>(random.between(-far, far));
      made.plane(3 + 2 * k)[i] = static_cast<int32_t>(weight << 16 | random.below(1 << 13));
    }
  }
  return made;
}

// About the range of each element, whose ends are escapes.
inline std::vector<int32_t> random_symbols(Random& random, MixtureWords& mixtures) {
  std::vector<int32_t> symbols(mixtures.count);
  const int64_t rare = random.one_of<int64_t>({1, 5, 100, int64_t{1} << 40});
  for (int64_t i = 0; i < mixtures.count; ++i) {
    const Range range{static_cast<uint32_t>(mixtures.plane(1)[i])};
    const auto value = static_cast<uint32_t>(static_cast<int32_t>(random.between(-2, range.size() + 3)));
    const auto raw = static_cast<uint32_t>(random.below(int64_t{1} << range.shift()));
    symbols[i] = static_cast<int32_t>(static_cast<uint32_t>(mixtures.plane(0)[i]) + (value << range.shift()) + raw);
    if (random.once_in(rare))
      symbols[i] = random.one_of<int32_t>({INT32_MIN, INT32_MAX, -129, 40000, static_cast<int32_t>(random.next())});
  }
  return symbols;
}

inline std::vector<int32_t> random_symbols(Random& random, const Tables& tables, const Indexes& indexes, int64_t n,
                                           int64_t skip) {
  std::vector<int32_t> symbols(n);
  const int64_t width = random.one_of<int64_t>({0, 1, 3, 300, 70000});
  const int64_t rare = random.one_of<int64_t>({1, 5, 100, int64_t{1} << 40});
  for (int64_t i = 0; i < n; ++i) {
    symbols[i] = static_cast<int32_t>(random.between(-width, width));
    if (random.once_in(rare))
      symbols[i] = random.one_of<int32_t>({INT32_MIN, INT32_MAX, -129, 40000, static_cast<int32_t>(random.next())});
    const auto left_out = [&](const auto& index) {
      if constexpr (std::is_same_v<std::decay_t<decltype(index)>, MixtureWords>)
        return false;
      else
        return skipped(tables, level_of(tables, index[i]), skip);
    };
    if (skip && std::visit(left_out, indexes)) symbols[i] = 0;
  }
  return symbols;
}

inline int64_t random_size(Random& random) {
  const int64_t kind = random.below(100);
  if (kind < 10) return random.one_of<int64_t>({0, 1, 2, 31, 32, 33, 64, 65});
  return random.below(kind < 70 ? 150 : kind < 95 ? 1000 : 6000);
}

// Appends words, escape values and check to the head.
template <class Elements>
void write_payload(const std::vector<std::unique_ptr<StreamEncoder<Elements>>>& coders, Bytes* out) {
  const auto append = [out](const void* from, int64_t bytes) {
    const auto* first = static_cast<const uint8_t*>(from);
    out->insert(out->end(), first, first + bytes);
  };
  for (const auto& coder : coders) append(coder->words.at(), 2 * coder->words.size());
  for (const auto& coder : coders) {
    for (int64_t i = 0; i < coder->escapes.size(); ++i) {
      const int32_t value = coder->escapes.from_last(i);
      append(&value, coder->result.escape_width);
    }
  }
  out->resize(out->size() + kCheckBytes);
  seal(out);
}

// False where an encoder refuses what it should take.
template <class Elements, class AnyTables>
bool encode_sample(Random& random, const AnyTables& tables, const Layout& layout, Elements elements, const Bytes& head,
                   Sample* sample) {
  std::vector<std::unique_ptr<StreamEncoder<Elements>>> coders;
  std::vector<Finished> finished;
  const auto n = static_cast<int64_t>(sample->symbols.size());
  const Variant variant = random_variant(random);
  for (int64_t w = 0; w < layout.streams; ++w) {
    coders.push_back(std::make_unique<StreamEncoder<Elements>>(tables, layout, n / layout.streams, variant));
    int64_t end = n;
    const int64_t steps = static_cast<int64_t>(sample->steps.size());
    if (variant == kLockstep) {
      const Status status = lockstep::encode(tables, layout, elements, sample->symbols.data(), sample->steps.data(),
                                             steps, w, coders[w].get());
      if (status != kDone) return false;
    }
    for (int64_t s = steps - 1; variant != kLockstep && s >= 0; --s) {
      end -= sample->steps[s];
      const Share share = share_of(sample->steps[s], layout, w);
      const int64_t first = end + share.first;
      if (coders[w]->add(elements + first, sample->symbols.data() + first, share.count) != kDone) return false;
    }
    if (variant != kLockstep) coders[w]->finish();
    finished.push_back(coders[w]->result);
  }
  sample->bytes =
      write_head(head.data(), static_cast<int64_t>(head.size()), finished.data(), layout.streams, layout.lanes);
  write_payload(coders, &sample->bytes);
  return true;
}

// The head of a container of n elements, in steps or one shape, both at random.
inline Bytes random_head(Random& random, int64_t n, int64_t log_lanes, int64_t streams, int64_t skip, uint8_t profile,
                         Sample* sample) {
  sample->stepwise = random.once_in(3);
  Bytes head = {'L', 'F', 'R', kVersionNumber, profile};
  head.push_back(static_cast<uint8_t>(log_lanes | (skip ? 8 : 0) | (sample->stepwise ? 16 : 0)));
  for (uint8_t i = 1; i <= 8; ++i) head.push_back(i);  // the table hash, which is Python's to compare
  if (skip) head.push_back(static_cast<uint8_t>(skip));
  sample->numbers_at = static_cast<int64_t>(head.size());
  put_number(&head, streams);
  if (sample->stepwise) {
    int64_t left = n;
    for (int64_t more = n ? random.below(6) : random.below(2); more > 0; --more) {
      sample->steps.push_back(random.below(left + 1));
      left -= sample->steps.back();
    }
    if (left) sample->steps.push_back(left);
    put_number(&head, sample->steps.size());
    put_number(&head, n);
  } else {
    sample->steps = {n};
    const int64_t sides = random.between(n == 1 ? 0 : 1, kMostDimensions), own = random.below(sides);
    put_number(&head, sides);
    for (int64_t i = 0; i < sides; ++i) put_number(&head, i == own ? n : 1);
  }
  return head;
}

inline int64_t random_streams(Random& random) {
  const int64_t most = random.once_in(30) ? kMostStreams : 40;
  return random.one_of<int64_t>({1, 1, 1, 2, 3, 8, random.between(1, most)});
}

inline bool make_sample(Random& random, const Tables& tables, Sample* sample) {
  const int64_t n = random_size(random), log_lanes = random.below(6), streams = random_streams(random);
  const int64_t skip = tables.ladder < 0 ? 0 : random.one_of<int64_t>({0, 0, 1, 40, kLadderLevels});
  sample->indexes = random_indexes(random, tables, n);
  sample->symbols = random_symbols(random, tables, sample->indexes, n, skip);
  const Bytes head = random_head(random, n, log_lanes, streams, skip, 0, sample);
  const Layout layout{int64_t{1} << log_lanes, streams, skip};
  const auto encode = [&](const auto& indexes) {
    if constexpr (std::is_same_v<std::decay_t<decltype(indexes)>, MixtureWords>)
      return false;
    else
      return encode_sample(random, tables, layout, elements_of(indexes), head, sample);
  };
  return std::visit(encode, sample->indexes);
}

inline bool make_sample(Random& random, const MixtureTables& tables, Sample* sample) {
  const int64_t n = random_size(random), log_lanes = random.below(6), streams = random_streams(random);
  MixtureWords mixtures = random_mixtures(random, n);
  sample->symbols = random_symbols(random, mixtures);
  const Bytes head = random_head(random, n, log_lanes, streams, 0, 1, sample);
  const Layout layout{int64_t{1} << log_lanes, streams, 0};
  const bool done = encode_sample(random, tables, layout, elements_of(mixtures), head, sample);
  sample->indexes = std::move(mixtures);
  return done;
}

}  // namespace lic_fast::rans::fuzz
