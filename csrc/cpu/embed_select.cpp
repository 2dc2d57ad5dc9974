// The `count` smallest of values [n] where mask, ties by index, as selected [n] bool: radix selection.
//
// Bits of a value become an unsigned key of the same order; what is not a candidate (NaN, mask False) gets the largest.
// Each pass over values counts a digit of the keys that share all digits found so far (fp32: 11 + 11 + 10 bits, fp64 in
// six passes) and finds the next digit of the threshold, the count-th smallest key. The last pass marks what lies below
// and counts ties in chunks of kChunk; where only some ties are taken, those chunks that have any are read once more.
// fp32: 4 to 5 times 4 bytes (and 1 of mask) read and 1 written an element. Counts are sums of integers, added in any
// order, and ties go by index: the same for any number of threads. Memory: 32 KiB of counts a thread, kBuckets totals,
// and 8 bytes for each chunk.
#include <array>
#include <limits>
#include <mutex>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace lic_fast {
namespace {

constexpr int32_t kDigit = 11;
constexpr int64_t kBuckets = int64_t{1} << kDigit;
constexpr int64_t kTables = 4;       // neighbours of one bucket do not wait for each other's store
constexpr int64_t kBlock = 1 << 11;  // keys, in the first-level cache
constexpr int64_t kChunk = 1 << 16;
constexpr int64_t kChunksAtOnce = 1 << 14;  // counted in 32 bits

struct Digit {
  int32_t shift;
  int32_t bits;
};
template <class Key>
constexpr std::array<Digit, 3> kDigits{{{21, 11}, {10, 11}, {0, 10}}};
template <>
constexpr std::array<Digit, 6> kDigits<uint64_t>{{{53, 11}, {42, 11}, {31, 11}, {20, 11}, {10, 10}, {0, 10}}};

template <class Key>
struct Source {
  const Key* bits;
  const uint8_t* mask;  // null where every element is a candidate
};

template <class Key>
LIC_FAST_INLINE Key key_of(Key bits) {
  constexpr Key kSign = Key{1} << (8 * sizeof(Key) - 1);
  constexpr Key kInfinity = static_cast<Key>(sizeof(Key) == 4 ? 0x7F800000u : 0x7FF0000000000000u);
  const Key magnitude = bits & ~kSign;
  Key key = (bits & kSign) ? ~bits : (bits | kSign);
  key = magnitude == 0 ? kSign : key;  // -0.0 is 0.0
  return magnitude > kInfinity ? ~Key{0} : key;
}

template <class Key>
LIC_FAST_INLINE void fill_keys(const Source<Key>& source, int64_t begin, int64_t n, Key* __restrict__ keys) {
  const Key* __restrict__ bits = source.bits + begin;
  if (source.mask) {
    const uint8_t* __restrict__ mask = source.mask + begin;
    for (int64_t i = 0; i < n; ++i) keys[i] = key_of(bits[i]) | (mask[i] ? Key{0} : ~Key{0});
  } else {
    for (int64_t i = 0; i < n; ++i) keys[i] = key_of(bits[i]);
  }
}

// The keys whose digits above `above` are `prefix`, moved to the front: how many.
template <class Key>
LIC_FAST_INLINE int64_t keep_matching(Key* keys, int64_t n, int32_t above, Key prefix) {
  Key matching = 0;
  for (int64_t i = 0; i < n; ++i) matching += (keys[i] >> above) == prefix;
  if (static_cast<int64_t>(matching) == n || matching == 0) return static_cast<int64_t>(matching);
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {  // no branch: a digit's share of the keys is hard to predict
    const Key key = keys[i];
    keys[kept] = key;
    kept += (key >> above) == prefix;
  }
  return kept;
}

// counts: kTables tables of kBuckets, added to. filter: not every key has the prefix.
template <class Key>
LIC_FAST_INLINE void count_digits(const Source<Key>& source, int64_t begin, int64_t end, Digit digit, bool filter,
                                  Key prefix, uint32_t* counts) {
  alignas(64) Key keys[kBlock];
  const Key mask = (Key{1} << digit.bits) - 1;
  for (; begin < end; begin += kBlock) {
    int64_t n = std::min(kBlock, end - begin);
    fill_keys(source, begin, n, keys);
    if (filter) n = keep_matching(keys, n, digit.shift + digit.bits, prefix);
    int64_t i = 0;
    for (; i + kTables <= n; i += kTables) {
#pragma GCC unroll 4
      for (int64_t table = 0; table < kTables; ++table) {
        ++counts[table * kBuckets + static_cast<int64_t>((keys[i + table] >> digit.shift) & mask)];
      }
    }
    for (; i < n; ++i) ++counts[static_cast<int64_t>((keys[i] >> digit.shift) & mask)];
  }
}

// selected = key < threshold; returns in `ties` how many keys equal it.
template <class Key>
LIC_FAST_INLINE void mark_below(const Source<Key>& source, int64_t begin, int64_t end, Key threshold, uint8_t* selected,
                                int64_t* ties) {
  alignas(64) Key keys[kBlock];
  Key equal = 0;
  for (; begin < end; begin += kBlock) {
    const int64_t n = std::min(kBlock, end - begin);
    fill_keys(source, begin, n, keys);
    uint8_t* __restrict__ out = selected + begin;
    for (int64_t i = 0; i < n; ++i) out[i] = keys[i] < threshold;
    for (int64_t i = 0; i < n; ++i) equal += keys[i] == threshold;
  }
  *ties = static_cast<int64_t>(equal);
}

// The first `taken` keys that equal the threshold.
template <class Key>
LIC_FAST_INLINE void mark_ties(const Source<Key>& source, int64_t begin, int64_t end, Key threshold, int64_t taken,
                               uint8_t* selected) {
  alignas(64) Key keys[kBlock];
  for (; begin < end && taken > 0; begin += kBlock) {
    const int64_t n = std::min(kBlock, end - begin);
    fill_keys(source, begin, n, keys);
    uint8_t* __restrict__ out = selected + begin;
    if (taken >= n) {
      Key equal = 0;
      for (int64_t i = 0; i < n; ++i) equal += keys[i] == threshold;
      for (int64_t i = 0; i < n; ++i) out[i] |= keys[i] == threshold;
      taken -= static_cast<int64_t>(equal);
      continue;
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t take = (keys[i] == threshold) & (taken > 0);
      out[i] |= static_cast<uint8_t>(take);
      taken -= take;
    }
  }
}

#define LIC_FAST_SELECT_VARIANTS(Key, suffix)                                                                          \
  template <class Isa>                                                                                                 \
  LIC_FAST_INLINE void count_##suffix##_body(const Source<Key>& source, int64_t begin, int64_t end, Digit digit,       \
                                             bool filter, Key prefix, uint32_t* counts) {                              \
    count_digits<Key>(source, begin, end, digit, filter, prefix, counts);                                              \
  }                                                                                                                    \
  LIC_FAST_SIMD_VARIANTS(                                                                                              \
      count_##suffix,                                                                                                  \
      (const Source<Key>& source, int64_t begin, int64_t end, Digit digit, bool filter, Key prefix, uint32_t* counts), \
      (source, begin, end, digit, filter, prefix, counts));                                                            \
  template <class Isa>                                                                                                 \
  LIC_FAST_INLINE void below_##suffix##_body(const Source<Key>& source, int64_t begin, int64_t end, Key threshold,     \
                                             uint8_t* selected, int64_t* ties) {                                       \
    mark_below<Key>(source, begin, end, threshold, selected, ties);                                                    \
  }                                                                                                                    \
  LIC_FAST_SIMD_VARIANTS(                                                                                              \
      below_##suffix,                                                                                                  \
      (const Source<Key>& source, int64_t begin, int64_t end, Key threshold, uint8_t* selected, int64_t* ties),        \
      (source, begin, end, threshold, selected, ties));                                                                \
  template <class Isa>                                                                                                 \
  LIC_FAST_INLINE void ties_##suffix##_body(const Source<Key>& source, int64_t begin, int64_t end, Key threshold,      \
                                            int64_t taken, uint8_t* selected) {                                        \
    mark_ties<Key>(source, begin, end, threshold, taken, selected);                                                    \
  }                                                                                                                    \
  LIC_FAST_SIMD_VARIANTS(                                                                                              \
      ties_##suffix,                                                                                                   \
      (const Source<Key>& source, int64_t begin, int64_t end, Key threshold, int64_t taken, uint8_t* selected),        \
      (source, begin, end, threshold, taken, selected))

LIC_FAST_SELECT_VARIANTS(uint32_t, 32);
LIC_FAST_SELECT_VARIANTS(uint64_t, 64);

template <class Key>
struct Loops;
template <>
struct Loops<uint32_t> {
  static constexpr const auto& count = count_32;
  static constexpr const auto& below = below_32;
  static constexpr const auto& ties = ties_32;
};
template <>
struct Loops<uint64_t> {
  static constexpr const auto& count = count_64;
  static constexpr const auto& below = below_64;
  static constexpr const auto& ties = ties_64;
};

template <class Key>
std::array<int64_t, kBuckets> histogram(const Source<Key>& source, int64_t n, Digit digit, bool filter, Key prefix) {
  std::array<int64_t, kBuckets> totals{};
  std::mutex lock;
  torch::stable::parallel_for(0, (n + kChunk - 1) / kChunk, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> counts(kTables * kBuckets);
    for (; begin < end; begin += kChunksAtOnce) {
      const int64_t stop = std::min(end, begin + kChunksAtOnce);
      std::fill(counts.begin(), counts.end(), 0u);
      Loops<Key>::count(source, begin * kChunk, std::min(n, stop * kChunk), digit, filter, prefix, counts.data());
      const std::lock_guard<std::mutex> held(lock);
      for (int64_t i = 0; i < kTables * kBuckets; ++i) totals[i % kBuckets] += counts[i];
    }
  });
  return totals;
}

// 1 <= count <= n.
template <class Key>
void select_smallest(const Source<Key>& source, int64_t n, int64_t count, uint8_t* selected) {
  int64_t rank = count, equal = n;  // the threshold is the rank-th of the `equal` keys that share its digits so far
  Key threshold = 0;
  for (const Digit digit : kDigits<Key>) {
    const auto totals = histogram<Key>(source, n, digit, equal < n, threshold);
    int64_t bucket = 0;
    for (; totals[bucket] < rank; ++bucket) rank -= totals[bucket];
    equal = totals[bucket];
    threshold = static_cast<Key>(threshold << digit.bits) | static_cast<Key>(bucket);
  }
  if (threshold == ~Key{0}) {
    rank = 0;  // fewer candidates than count: all of them lie below
  } else if (rank == equal) {
    ++threshold;  // every tie is taken
    rank = 0;
  }
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  std::vector<int64_t> ties(chunks);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      Loops<Key>::below(source, c * kChunk, std::min(n, (c + 1) * kChunk), threshold, selected, &ties[c]);
    }
  });
  if (rank == 0) return;
  for (int64_t c = 0; c < chunks; ++c) {  // from how many there are to how many are taken
    ties[c] = std::min(ties[c], rank);
    rank -= ties[c];
  }
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      if (ties[c]) Loops<Key>::ties(source, c * kChunk, std::min(n, (c + 1) * kChunk), threshold, ties[c], selected);
    }
  });
}

// values fp32 or fp64 [n], mask [n] or none, selected [n], all contiguous; 1 <= count <= n.
void embed_select_out(Tensor values, int64_t count, std::optional<Tensor> mask, Tensor selected) {
  const int64_t n = values.numel();
  check_same_numel(values, selected);
  if (mask) check_same_numel(values, *mask);
  STD_TORCH_CHECK(1 <= count && count <= n, "embed_select: count must be 1 to n");
  const uint8_t* allowed = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
  uint8_t* out = static_cast<uint8_t*>(selected.mutable_data_ptr());
  if (values.scalar_type() == ScalarType::Float) {
    select_smallest<uint32_t>({static_cast<const uint32_t*>(values.const_data_ptr()), allowed}, n, count, out);
  } else {
    select_smallest<uint64_t>({static_cast<const uint64_t*>(values.const_data_ptr()), allowed}, n, count, out);
  }
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cpp, m) {
  m.def("embed_select_out(Tensor values, int count, Tensor? mask, Tensor(a!) selected) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("embed_select_out", TORCH_BOX(&lic_fast::embed_select_out));
}
