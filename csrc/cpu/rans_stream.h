// Streams on the CPU: shares of steps, skipping, blocks and tails (docs/BITSTREAM.md, sections 3 to 5) around the
// kernels of one instruction set. Free of torch.
#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "common/rans_container.h"
#include "cpu/rans_avx2.h"
#include "cpu/rans_avx512.h"
#include "cpu/rans_mixture_avx2.h"
#include "cpu/rans_mixture_avx512.h"

namespace lic_fast::rans {

// kLockstep is what a GPU runs, in rans_lockstep.h: for tests.
enum Variant : int64_t { kBest = 0, kScalar = 1, kAvx2 = 2, kAvx512Loads = 3, kAvx512Gathers = 4, kLockstep = 5 };

inline bool has(Variant variant) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (variant == kAvx2) return avx2;
  if (variant == kAvx512Loads || variant == kAvx512Gathers) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return variant == kBest || variant == kScalar || variant == kLockstep;
}

// The fastest of this processor, or a lesser one that LIC_FAST_SIMD asks for.
inline Variant best_variant() {
  static const Variant best = [] {
#if defined(__x86_64__)
    Variant top = select_simd(kScalar, kAvx2, kAvx512Loads);
    if (top == kAvx512Loads && !__builtin_cpu_is("amd")) top = kAvx512Gathers;
    if (!has(top)) top = has(kAvx2) ? kAvx2 : kScalar;
    return top;
#else
    return kScalar;
#endif
  }();
  return best;
}

// How a source's elements are coded: by which tables.
template <class Source>
struct TableSetOf {
  using type = Tables;
};
template <>
struct TableSetOf<Mixtures> {
  using type = MixtureTables;
};

template <class Source>
struct Kernels {
  using TableSet = typename TableSetOf<Source>::type;
  void (*decode)(DecodingOf<TableSet>&, Source, int32_t*, int64_t);
  void (*encode)(EncodingOf<TableSet>&, Source, const int32_t*, int64_t);
};

template <class Index>
Kernels<const Index*> kernels_of(Variant variant, const Index*) {
  if (variant == kBest) variant = best_variant();
#if defined(__x86_64__)
  if (variant == kAvx2) return {avx2::decode<Index>, avx2::encode<Index>};
  if (variant == kAvx512Loads) return {avx512::decode<avx512::Loads, Index>, avx512::encode<avx512::Loads, Index>};
  if (variant == kAvx512Gathers)
    return {avx512::decode<avx512::Gathers, Index>, avx512::encode<avx512::Gathers, Index>};
#endif
  return {scalar::decode<Index>, scalar::encode<Tables, const Index*>};
}

inline Kernels<Mixtures> kernels_of(Variant variant, Mixtures) {
  if (variant == kBest) variant = best_variant();
#if defined(__x86_64__)
  if (variant == kAvx2) return {avx2::decode_mixtures, avx2::encode_mixtures};
  if (variant == kAvx512Loads || variant == kAvx512Gathers) return {avx512::decode_mixtures, avx512::encode_mixtures};
#endif
  return {scalar::decode_mixtures, scalar::encode<MixtureTables, Mixtures>};
}

inline bool in_range(const MixtureTables&, Mixtures elements, int64_t count) { return valid(elements, count); }
inline bool in_range(const Tables&, const float*, int64_t) { return true; }
template <class Index>
bool in_range(const Tables& tables, const Index* index, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, static_cast<uint32_t>(index[i]));
  return most < static_cast<uint32_t>(tables.levels);
}

// Decodes a step's share of a stream into symbols.
template <class Source>
class StreamDecoder {
 public:
  using TableSet = typename TableSetOf<Source>::type;
  StreamDecoder(const TableSet& tables, const Layout& layout, const uint8_t* container, StreamState* state,
                Variant variant)
      : tables_(tables),
        layout_(layout),
        container_(container),
        state_(*state),
        kernels_(kernels_of(variant, Source{})) {}

  Status run(Source source, int32_t* symbols, int64_t count) {
    if constexpr (std::is_pointer_v<Source>) {
      if (layout_.skip) return run_skipping(source, symbols, count);
    }
    return decode(source, symbols, count);
  }

 private:
  template <class Index>
  Status run_skipping(const Index* index, int32_t* symbols, int64_t count) {
    std::vector<Index> kept(count);
    int64_t n = 0;
    for (int64_t i = 0; i < count; ++i) {
      kept[n] = index[i];
      n += !skipped(tables_, level_of(tables_, index[i]), layout_.skip);
    }
    std::vector<int32_t> values(n + 1);
    const Status status = decode(kept.data(), values.data(), n);
    n = 0;
    for (int64_t i = 0; i < count; ++i) {
      const bool coded = !skipped(tables_, level_of(tables_, index[i]), layout_.skip);
      symbols[i] = coded ? values[n] : 0;
      n += coded;
    }
    return status;
  }

  Status decode(Source index, int32_t* symbols, int64_t count) {
    Escapes escapes{container_ + state_.escape_at, state_.escapes, 0, static_cast<int32_t>(state_.escape_width)};
    while (count > 0) {
      enter_tail();
      const int64_t rows = state_.rows < 0 ? kBlockRows : std::min(kBlockRows, state_.rows);
      const int64_t n = std::min(count, rows * layout_.lanes);
      if (!in_range(tables_, index, n)) return kIndexOutside;
      if (const Status status = block(index, symbols, n, escapes); status != kDone) return status;
      index += n, symbols += n, count -= n;
    }
    enter_tail();
    state_.escape_at += escapes.at * state_.escape_width;
    state_.escapes -= escapes.at;
    return state_.escapes < 0 ? kRanOut : kDone;
  }

  void enter_tail() {
    if (state_.rows != 0) return;
    for (int64_t i = 0; i < layout_.lanes; ++i) state_.x[i] -= kLow;
    state_.rows = -1;
  }

  // Words are read from a copy with zeros behind them where the container has not enough for any block.
  Status block(Source index, int32_t* symbols, int64_t n, Escapes& escapes) {
    const int64_t rows = (n + layout_.lanes - 1) / layout_.lanes;
    const bool tail = state_.rows < 0;
    const int64_t most = tail ? kSlack : 2 * rows * layout_.lanes + kSlack;
    const uint8_t* words = container_ + state_.word_at;
    uint16_t copy[kBlockWords + kSlack];
    const bool direct = state_.words >= most;
    if (!direct) {
      const int64_t there = tail ? 0 : state_.words;
      std::memcpy(copy, words, 2 * there);
      std::memset(copy + there, 0, 2 * (most - there));
      words = reinterpret_cast<const uint8_t*>(copy);
    }
    DecodingOf<TableSet> d{&tables_, static_cast<int32_t>(layout_.lanes), !tail, words, state_.x, &escapes};
    kernels_.decode(d, index, symbols, n);
    const int64_t used = (d.words - words) / 2;
    state_.word_at += 2 * used;
    state_.words -= used;
    if (!tail) state_.rows -= rows;
    return state_.words < 0 ? kRanOut : kDone;
  }

  const TableSet& tables_;
  const Layout layout_;
  const uint8_t* container_;
  StreamState& state_;
  const Kernels<Source> kernels_;
};

// Words put from the end to the front of memory that grows.
class Words {
 public:
  explicit Words(int64_t room) : room_(room), memory_(new uint16_t[room]), at_(memory_.get() + room) {}
  uint16_t*& at() { return at_; }
  int64_t size() const { return memory_.get() + room_ - at_; }
  void reserve(int64_t count) {
    if (at_ - memory_.get() >= count) return;
    const int64_t used = size(), room = 2 * room_ + count;
    std::unique_ptr<uint16_t[]> larger(new uint16_t[room]);
    std::memcpy(larger.get() + (room - used), at_, used * sizeof(uint16_t));
    memory_ = std::move(larger);
    room_ = room;
    at_ = memory_.get() + room - used;
  }

 private:
  int64_t room_;
  std::unique_ptr<uint16_t[]> memory_;
  uint16_t* at_;
};

// Encodes a stream's shares, given from the last step to the first.
template <class Source>
class StreamEncoder {
 public:
  using TableSet = typename TableSetOf<Source>::type;
  StreamEncoder(const TableSet& tables, const Layout& layout, int64_t elements, Variant variant)
      : words(elements / 4 + kBlockWords + kSlack),
        tables_(tables),
        layout_(layout),
        kernels_(kernels_of(variant, Source{})) {}

  Status add(Source source, const int32_t* symbols, int64_t count) {
    if constexpr (std::is_pointer_v<Source>) {
      if (layout_.skip) return add_skipping(source, symbols, count);
    }
    return encode(source, symbols, count);
  }

  void finish() {
    if (tail_) lift();
    result.words = words.size();
    result.escapes = escapes.size();
    for (int64_t i = 0; i < escapes.size(); ++i) {
      const int32_t value = escapes.from_last(i);
      const int64_t width = value == static_cast<int8_t>(value) ? 1 : value == static_cast<int16_t>(value) ? 2 : 4;
      result.escape_width = std::max(result.escape_width, width);
    }
  }

  Words words;
  EscapeSink escapes;
  Finished result;

 private:
  template <class Index>
  Status add_skipping(const Index* index, const int32_t* symbols, int64_t count) {
    if (!in_range(tables_, index, count)) return kIndexOutside;
    std::vector<Index> kept(count + 1);
    std::vector<int32_t> values(count + 1);
    int64_t n = 0;
    int32_t lost = 0;
    for (int64_t i = 0; i < count; ++i) {
      const bool out = skipped(tables_, level_of(tables_, index[i]), layout_.skip);
      lost |= out ? symbols[i] : 0;
      kept[n] = index[i];
      values[n] = symbols[i];
      n += !out;
    }
    return lost ? kNotZero : encode(kept.data(), values.data(), n);
  }

  Status encode(Source index, const int32_t* symbols, int64_t count) {
    const int64_t lanes = layout_.lanes;
    EncodingOf<TableSet> e{&tables_, static_cast<int32_t>(lanes), nullptr, result.x, &escapes};
    while (tail_ && count > 0) {
      const int64_t first = (count - 1) / lanes * lanes;
      if (!in_range(tables_, index + first, count - first)) return kIndexOutside;
      if (tail_rows_ == kMostTailRows ||
          !scalar::encode_tail_row(e, index + first, symbols + first, static_cast<int32_t>(count - first))) {
        lift();
        break;
      }
      ++tail_rows_;
      count = first;
    }
    result.rows += (count + lanes - 1) / lanes;
    const int64_t block = kBlockRows * lanes;
    for (int64_t first = (count - 1) / block * block; count > 0; count = first, first -= block) {
      if (!in_range(tables_, index + first, count - first)) return kIndexOutside;
      words.reserve(kBlockWords + kSlack);
      e.words = words.at();
      kernels_.encode(e, index + first, symbols + first, count - first);
      words.at() = e.words;
    }
    return kDone;
  }

  void lift() {
    tail_ = false;
    for (int64_t i = 0; i < layout_.lanes; ++i) result.x[i] += kLow;
  }

  const TableSet& tables_;
  const Layout layout_;
  const Kernels<Source> kernels_;
  bool tail_ = true;
  int64_t tail_rows_ = 0;
};

}  // namespace lic_fast::rans
