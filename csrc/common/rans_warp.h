// Decoding a stream by a warp: a thread a lane of docs/BITSTREAM.md, words dealt out by a ballot and population counts.
//
// Written once, over a `Warp` that says what a warp is. On a GPU (cuda/rans_coder.cuh) `each` runs its body in this
// thread, for this lane, and Each<T> is a register; csrc/cpu/rans_lockstep.h runs it for 32 lanes in turn, so that
// tests on any machine hold the same text to the same bytes. Between two calls of `each` lanes know of each other what
// ballots and shuffles tell, and what lies in memory that was written before a `sync`.
//
// What bounds a row is the chain from a state to the next: two look-ups in tables, a product, a ballot, a shuffle. What
// does not hang on a state is out of it: words lie in registers before they are needed, indexes (and means) of a few
// rows are loaded while as many others are decoded. Of mixtures it is the search, whose lanes wait for the longest of a
// row: probe after probe of products and look-ups, a few dozen operations a component. Free of torch.
#pragma once

#include "common/rans_source.h"
#include "common/rans_state.h"

namespace lic_fast::rans::warp {

constexpr int32_t kQueue = 64;  // elements that wait for a row, where others are skipped

LIC_FAST_ANYWHERE uint32_t first_lanes(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }
LIC_FAST_ANYWHERE bool in(uint32_t mask, int32_t lane) { return mask >> lane & 1u; }

LIC_FAST_ANYWHERE int32_t count_of(uint32_t mask) {
#ifdef __CUDA_ARCH__
  return __popc(mask);
#else
  return __builtin_popcount(mask);
#endif
}

// How many of the mask are lower lanes.
LIC_FAST_ANYWHERE int32_t rank_of(uint32_t mask, int32_t lane) { return count_of(mask & ((1u << lane) - 1)); }

// The words of a stream: 64 of them in registers, two a lane, and 32 on their way. Past the end they are 0. Bytes are
// read one by one, so that a container may lie anywhere.
template <class Warp>
class Words {
  template <class T>
  using Each = typename Warp::template Each<T>;

 public:
  LIC_FAST_ANYWHERE Words(Warp& warp, const uint8_t* data, int64_t there) : warp_(warp), data_(data), there_(there) {
    warp_.each([&](int32_t lane) {
      held_[lane] = word(lane) | word(32 + lane) << 16;
      coming_[lane] = word(64 + lane);
    });
  }

  // Gives the next words to the lanes of `need`, in their order.
  LIC_FAST_ANYWHERE void refill(uint32_t need, Each<uint32_t>& x) {
    const auto place = [&](int32_t lane) { return at_ + rank_of(need, lane); };
    const Each<uint32_t> two = warp_.shuffle(held_, [&](int32_t lane) { return place(lane) & 31; });
    warp_.each([&](int32_t lane) {
      const uint32_t word = place(lane) < 32 ? two[lane] & 0xFFFFu : two[lane] >> 16;
      if (in(need, lane)) x[lane] = x[lane] << kWordBits | word;
    });
    at_ += count_of(need);
    if (at_ < 32) return;
    at_ -= 32;
    base_ += 32;
    warp_.each([&](int32_t lane) {
      held_[lane] = held_[lane] >> 16 | coming_[lane] << 16;
      coming_[lane] = word(base_ + 64 + lane);
    });
  }

  LIC_FAST_ANYWHERE int64_t taken() const { return base_ + at_; }

 private:
  LIC_FAST_ANYWHERE uint32_t word(int64_t i) const {
    return i < there_ ? data_[2 * i] | static_cast<uint32_t>(data_[2 * i + 1]) << 8 : 0u;
  }

  Warp& warp_;
  const uint8_t* data_;
  const int64_t there_;
  int64_t base_ = 0;
  int32_t at_ = 0;  // below 32
  Each<uint32_t> held_, coming_;
};

// Decodes steps' shares of a stream. Whatever container, state and indexes hold, nothing outside them is read: tables
// are looked up at levels that exist, words and escape values where the container has them.
//
// A Source has, for element i of the share: place(i), where it lies; fetch(place), what is known of it; by, which makes
// what it is coded as of that (common/rans_source.h); and put(place, fetched, symbol).
template <class Warp, class Source>
class Decoder {
  template <class T>
  using Each = typename Warp::template Each<T>;
  using Place = typename Source::Place;
  using Fetched = typename Source::Fetched;
  using By = typename Source::Coding;
  using TableSet = typename By::TableSet;
  using Element = typename By::Element;
  static constexpr int32_t kAhead = By::kAhead;

 public:
  LIC_FAST_ANYWHERE Decoder(Warp& warp, const TableSet& tables, const Layout& layout, const uint8_t* container,
                            int64_t bytes, StreamState* state)
      : warp_(warp),
        tables_(tables),
        skip_(static_cast<int32_t>(layout.skip)),
        lanes_(static_cast<int32_t>(layout.lanes)),
        state_(state),
        words_(warp, container + bounded(state->word_at, bytes),
               bounded(state->words, (bytes - bounded(state->word_at, bytes)) / 2)),
        escape_width_(state->escape_width == 1 || state->escape_width == 2 ? state->escape_width : 4),
        escapes_(container + bounded(state->escape_at, bytes)),
        escapes_there_(
            bounded(state->escapes, (bytes - bounded(state->escape_at, bytes)) / static_cast<int64_t>(escape_width_))),
        rows_(state->rows) {
    warp_.each([&](int32_t lane) { x_[lane] = state->x[lane]; });
  }

  LIC_FAST_ANYWHERE Status run(Source& source, int32_t count) {
    warp_.each([&](int32_t lane) { outside_[lane] = false; });
    if constexpr (By::kSkips) {
      if (skip_) {
        run_kept(source, count);
      } else {
        run_all(source, count);
      }
    } else {
      run_all(source, count);
    }
    if (rows_ == 0) enter_tail();
    return leave();
  }

 private:
  static LIC_FAST_ANYWHERE int64_t bounded(int64_t value, int64_t most) {
    return value < 0 ? 0 : value < most ? value : most;
  }

  // kAhead rows of elements. Lanes beyond the count hold the first element, and rest.
  struct Rows {
    Each<Place> place[kAhead];
    Each<Fetched> fetched[kAhead];
  };

  LIC_FAST_ANYWHERE void place(Source& source, Rows& rows, int32_t row, int32_t count) {
    LIC_FAST_UNROLL
    for (int32_t j = 0; j < kAhead; ++j) {
      warp_.each([&](int32_t lane) {
        const int32_t i = (row + j) * lanes_ + lane;
        rows.place[j][lane] = source.place(i < count ? i : 0);
      });
    }
  }
  LIC_FAST_ANYWHERE void fetch(Source& source, Rows& rows) {
    LIC_FAST_UNROLL
    for (int32_t j = 0; j < kAhead; ++j) {
      warp_.each([&](int32_t lane) { rows.fetched[j][lane] = source.fetch(rows.place[j][lane]); });
    }
  }

  LIC_FAST_ANYWHERE void run_all(Source& source, int32_t count) {
    if (count <= 0) return;
    Rows now, next, after;
    place(source, now, 0, count);
    place(source, next, kAhead, count);
    fetch(source, now);
    for (int32_t row = 0; row * lanes_ < count; row += kAhead) {
      place(source, after, row + 2 * kAhead, count);  // a place must have come before what lies there is asked for
      fetch(source, next);
      LIC_FAST_UNROLL
      for (int32_t j = 0; j < kAhead; ++j) {
        const int32_t left = count - (row + j) * lanes_;
        if (left > 0) decode_row(source, now.place[j], now.fetched[j], first_lanes(left < lanes_ ? left : lanes_));
      }
      now = next;
      LIC_FAST_UNROLL
      for (int32_t j = 0; j < kAhead; ++j) next.place[j] = after.place[j];
    }
  }

  // Elements that are coded wait in a queue until they fill a row; the r-th has place r mod kQueue.
  LIC_FAST_ANYWHERE void run_kept(Source& source, int32_t count) {
    int32_t queued = 0, done = 0;
    for (int32_t first = 0; first < count; first += 32) {
      Each<bool> kept;
      warp_.each([&](int32_t lane) {
        kept[lane] = false;
        if (first + lane >= count) return;
        const Place where = source.place(first + lane);
        const Fetched fetched = source.fetch(where);
        kept[lane] = !source.by.left_out(tables_, source.code(fetched), skip_);
        if (!kept[lane]) outside_[lane] |= !source.put(where, fetched, 0);
      });
      const uint32_t mask = warp_.ballot([&](int32_t lane) { return kept[lane]; });
      warp_.each([&](int32_t lane) {
        if (kept[lane]) warp_.queue[(queued + rank_of(mask, lane)) & (kQueue - 1)] = first + lane;
      });
      warp_.sync();
      queued += count_of(mask);
      for (; queued - done >= lanes_; done += lanes_) decode_queued(source, done, lanes_);
      warp_.sync();
    }
    if (queued > done) decode_queued(source, done, queued - done);
  }

  LIC_FAST_ANYWHERE void decode_queued(Source& source, int32_t first, int32_t count) {
    Each<Place> where;
    Each<Fetched> fetched;
    warp_.each([&](int32_t lane) {
      where[lane] = source.place(warp_.queue[(first + (lane < count ? lane : 0)) & (kQueue - 1)]);
      fetched[lane] = source.fetch(where[lane]);
    });
    decode_row(source, where, fetched, first_lanes(count));
  }

  LIC_FAST_ANYWHERE void enter_tail() {
    warp_.each([&](int32_t lane) {
      if (lane < lanes_) x_[lane] -= kLow;
    });
    rows_ = -1;
  }

  LIC_FAST_ANYWHERE void refill(uint32_t allowed) {
    const uint32_t need = warp_.ballot([&](int32_t lane) { return in(allowed, lane) && x_[lane] < kLow; });
    words_.refill(need, x_);
  }

  LIC_FAST_ANYWHERE void decode_row(Source& source, const Each<Place>& where, const Each<Fetched>& fetched,
                                    uint32_t active) {
    if (rows_ == 0) enter_tail();
    const bool refills = rows_ > 0;
    const int32_t precision = tables_.precision;
    Each<Element> element;
    Each<uint32_t> number, value, raw;
    warp_.each(
        [&](int32_t lane) { element[lane] = source.by.element(tables_, source.code(fetched[lane]), outside_[lane]); });
    const uint32_t shifted = warp_.ballot([&](int32_t lane) { return in(active, lane) && element[lane].shift() != 0; });
    warp_.each([&](int32_t lane) {
      const uint32_t slot = x_[lane] & ((1u << precision) - 1);
      const Symbol symbol = find_ahead(tables_, element[lane], slot);
      if (in(active, lane)) x_[lane] = rans::taken(x_[lane], symbol, slot, precision);
      number[lane] = symbol.number;
      value[lane] = value_of(element[lane], symbol.number);
      raw[lane] = 0;
    });
    if (refills) refill(active);
    if (shifted) {
      warp_.each([&](int32_t lane) {
        if (!in(shifted, lane)) return;
        raw[lane] = x_[lane] & ((1u << element[lane].shift()) - 1);
        x_[lane] >>= element[lane].shift();
      });
      if (refills) refill(shifted);
    }
    const uint32_t escaped =
        warp_.ballot([&](int32_t lane) { return in(active, lane) && is_escape(element[lane], number[lane]); });
    if (escaped) {
      warp_.each([&](int32_t lane) {
        if (in(escaped, lane)) value[lane] = escape_value(escapes_taken_ + rank_of(escaped, lane));
      });
      escapes_taken_ += count_of(escaped);
    }
    warp_.each([&](int32_t lane) {
      if (!in(active, lane)) return;
      const int32_t symbol = joined(element[lane], value[lane], raw[lane]);
      outside_[lane] |= !source.put(where[lane], fetched[lane], symbol);
    });
    rows_ -= refills;
  }

  LIC_FAST_ANYWHERE uint32_t escape_value(int64_t i) const {
    if (i >= escapes_there_) return 0;
    const uint8_t* p = escapes_ + i * escape_width_;
    if (escape_width_ == 1) return static_cast<uint32_t>(static_cast<int8_t>(p[0]));
    if (escape_width_ == 2) return static_cast<uint32_t>(static_cast<int16_t>(p[0] | p[1] << 8));
    return p[0] | p[1] << 8 | p[2] << 16 | static_cast<uint32_t>(p[3]) << 24;
  }

  // Leaves the state as the next step begins with it.
  LIC_FAST_ANYWHERE Status leave() {
    const int64_t words = state_->words - words_.taken(), escapes = state_->escapes - escapes_taken_;
    const uint32_t outside = warp_.ballot([&](int32_t lane) { return outside_[lane]; });
    warp_.sync();  // all lanes have read what one now writes
    warp_.each([&](int32_t lane) {
      state_->x[lane] = x_[lane];
      if (lane > 0) return;
      state_->word_at += 2 * words_.taken();
      state_->words = words;
      state_->escape_at += escapes_taken_ * state_->escape_width;
      state_->escapes = escapes;
      state_->rows = rows_;
    });
    warp_.sync();
    return outside ? kIndexOutside : words < 0 || escapes < 0 ? kRanOut : kDone;
  }

  Warp& warp_;
  const TableSet& tables_;
  const int32_t skip_, lanes_;
  StreamState* state_;
  Words<Warp> words_;
  const int32_t escape_width_;
  const uint8_t* escapes_;
  const int64_t escapes_there_;
  int64_t escapes_taken_ = 0;
  int64_t rows_;  // before the tail; -1 in it
  Each<uint32_t> x_;
  Each<bool> outside_;
};

// Whether nothing of a stream is left over after its last row.
template <class Warp>
LIC_FAST_ANYWHERE bool used_up(Warp& warp, const Layout& layout, const StreamState& state) {
  const uint32_t low = state.rows == 0 ? kLow : 0;
  const uint32_t left = warp.ballot([&](int32_t lane) { return lane < layout.lanes && state.x[lane] != low; });
  return !left && state.words == 0 && state.escapes == 0 && state.rows <= 0;
}

}  // namespace lic_fast::rans::warp
