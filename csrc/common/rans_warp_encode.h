// Encoding a stream by a warp, from its last row to its first: the inverse of common/rans_warp.h, in the same manner.
#pragma once

#include "common/rans_warp.h"

namespace lic_fast::rans::warp {

// x div f. The quotient is below 2^22 (a state that takes a symbol is below f * 2^(32 - precision), the precision 10 at
// least), where the float quotient is at most 1 off: its three roundings come to 3 * 2^-24 of it.
LIC_FAST_ANYWHERE uint32_t divided(uint32_t x, uint32_t f, float reciprocal) {
  const uint32_t quotient = static_cast<uint32_t>(static_cast<float>(x) * reciprocal);
  const int32_t rest = static_cast<int32_t>(x - quotient * f);
  return rest < 0 ? quotient - 1 : rest >= static_cast<int32_t>(f) ? quotient + 1 : quotient;
}

// Takes a stream's shares from the last step to the first. Words and escape values are put before the ends given, where
// there is room for two words and one value an element.
template <class Warp, class By>
class Encoder {
  template <class T>
  using Each = typename Warp::template Each<T>;
  using TableSet = typename By::TableSet;
  using Fetched = typename Given<By>::Fetched;
  static constexpr int32_t kAhead = By::kAhead;

 public:
  LIC_FAST_ANYWHERE Encoder(Warp& warp, const TableSet& tables, const Layout& layout, uint16_t* words_end,
                            int32_t* escapes_end)
      : warp_(warp), tables_(tables), layout_(layout), words_end_(words_end), escapes_end_(escapes_end) {
    warp_.each([&](int32_t lane) { x_[lane] = 0, outside_[lane] = false, lost_[lane] = false, width_[lane] = 1; });
  }

  LIC_FAST_ANYWHERE void add(const Given<By>& source, int64_t count) {
    if constexpr (By::kSkips) {
      if (layout_.skip) return add_kept(source, count);
    }
    add_all(source, count);
  }

  LIC_FAST_ANYWHERE Status finish(Finished* out) {
    if (in_tail_) lift();
    const uint32_t two = warp_.ballot([&](int32_t lane) { return width_[lane] == 2; });
    const uint32_t four = warp_.ballot([&](int32_t lane) { return width_[lane] == 4; });
    warp_.each([&](int32_t lane) {
      out->x[lane] = lane < layout_.lanes ? x_[lane] : 0;
      if (lane > 0) return;
      out->rows = rows_;
      out->words = words_;
      out->escapes = escapes_;
      out->escape_width = four ? 4 : two ? 2 : 1;
    });
    if (warp_.ballot([&](int32_t lane) { return outside_[lane]; })) return kIndexOutside;
    return warp_.ballot([&](int32_t lane) { return lost_[lane]; }) ? kNotZero : kDone;
  }

 private:
  // kAhead rows, the last of which is `row`.
  LIC_FAST_ANYWHERE void fetch(Each<Fetched>* rows, const Given<By>& source, int64_t row, int64_t count) {
    LIC_FAST_UNROLL
    for (int32_t j = 0; j < kAhead; ++j) {
      warp_.each([&](int32_t lane) {
        const int64_t i = (row - j) * layout_.lanes + lane, at = i >= 0 && i < count ? i : 0;
        rows[j][lane] = source.fetch(at);
      });
    }
  }

  LIC_FAST_ANYWHERE void add_all(const Given<By>& source, int64_t count) {
    if (count <= 0) return;
    const int64_t lanes = layout_.lanes;
    Each<Fetched> now[kAhead], next[kAhead];
    int64_t row = (count - 1) / lanes;
    fetch(now, source, row, count);
    for (; row >= 0; row -= kAhead) {
      fetch(next, source, row - kAhead, count);
      LIC_FAST_UNROLL
      for (int32_t j = 0; j < kAhead; ++j) {
        const int64_t left = count - (row - j) * lanes;
        if (row >= j) encode_row(source, now[j], first_lanes(left < lanes ? left : lanes));
      }
      LIC_FAST_UNROLL
      for (int32_t j = 0; j < kAhead; ++j) now[j] = next[j];
    }
  }

  LIC_FAST_ANYWHERE bool left_out(const Given<By>& source, int64_t i) const {
    return source.by.left_out(tables_, source.by.fetch(i), static_cast<int32_t>(layout_.skip));
  }

  // Rows fill from the first element that is coded, so these are counted before any waits in the queue.
  LIC_FAST_ANYWHERE void add_kept(const Given<By>& source, int64_t count) {
    int64_t queued = 0;
    for (int64_t first = 0; first < count; first += 32) {
      queued +=
          count_of(warp_.ballot([&](int32_t lane) { return first + lane < count && !left_out(source, first + lane); }));
    }
    int64_t row = (queued + layout_.lanes - 1) / layout_.lanes - 1, end = queued;  // ranks below `queued` are to come
    for (int64_t first = (count - 1) / 32 * 32; first >= 0 && count > 0; first -= 32) {
      Each<bool> kept;
      warp_.each([&](int32_t lane) {
        kept[lane] = first + lane < count && !left_out(source, first + lane);
        if (first + lane < count && !kept[lane]) lost_[lane] |= source.symbols[first + lane] != 0;
      });
      const uint32_t mask = warp_.ballot([&](int32_t lane) { return kept[lane]; });
      queued -= count_of(mask);
      warp_.each([&](int32_t lane) {
        if (kept[lane]) warp_.queue[(queued + rank_of(mask, lane)) & (kQueue - 1)] = first + lane;
      });
      warp_.sync();
      for (; row >= 0 && row * layout_.lanes >= queued; --row) {
        const int64_t rank = row * layout_.lanes, active = end - rank;
        Each<Fetched> fetched;
        warp_.each([&](int32_t lane) {
          fetched[lane] = source.fetch(warp_.queue[(rank + (lane < active ? lane : 0)) & (kQueue - 1)]);
        });
        encode_row(source, fetched, first_lanes(active));
        end = rank;
      }
      warp_.sync();
    }
  }

  LIC_FAST_ANYWHERE void encode_row(const Given<By>& source, const Each<Fetched>& fetched, uint32_t active) {
    Each<Coded> row;
    warp_.each([&](int32_t lane) {
      const auto element = source.by.element(tables_, fetched[lane].code, outside_[lane]);
      row[lane] = coded(tables_, element, fetched[lane].symbol);
    });
    if (!in_tail_ || !put_in_tail(row, active)) {
      if (in_tail_) lift();
      ++rows_;
      put_bits(row, active);
      put_symbols(row, active);
    }
    const uint32_t escaped = warp_.ballot([&](int32_t lane) { return in(active, lane) && row[lane].escaped; });
    if (!escaped) return;
    escapes_ += count_of(escaped);
    warp_.each([&](int32_t lane) {
      if (!in(escaped, lane)) return;
      const int32_t value = row[lane].value;
      escapes_end_[rank_of(escaped, lane) - escapes_] = value;
      const int32_t width = value == static_cast<int8_t>(value) ? 1 : value == static_cast<int16_t>(value) ? 2 : 4;
      width_[lane] = width > width_[lane] ? width : width_[lane];
    });
  }

  // Whether the row belongs to the tail: it is then in the states. These only grow by it, so that what is too large
  // before the division is too large after it, and 32 bits do to divide.
  LIC_FAST_ANYWHERE bool put_in_tail(const Each<Coded>& row, uint32_t active) {
    if (tail_rows_ == kMostTailRows) return false;
    constexpr uint64_t kLimit = 0xFFFF0000u;
    Each<uint64_t> after;
    const uint32_t too_large = warp_.ballot([&](int32_t lane) {
      const Coded& c = row[lane];
      after[lane] = static_cast<uint64_t>(x_[lane]) << c.shift | c.raw;
      if (after[lane] < kLimit) {
        const uint32_t before = static_cast<uint32_t>(after[lane]), quotient = before / c.frequency;
        after[lane] =
            (static_cast<uint64_t>(quotient) << tables_.precision) + (before - quotient * c.frequency) + c.start;
      }
      return in(active, lane) && after[lane] >= kLimit;
    });
    if (too_large) return false;
    ++tail_rows_;
    warp_.each([&](int32_t lane) {
      if (in(active, lane)) x_[lane] = static_cast<uint32_t>(after[lane]);
    });
    return true;
  }

  LIC_FAST_ANYWHERE void lift() {
    in_tail_ = false;
    warp_.each([&](int32_t lane) { x_[lane] += kLow; });
  }

  // Puts the low halves of these lanes before the words so far.
  LIC_FAST_ANYWHERE void put(uint32_t lanes) {
    if (!lanes) return;
    words_ += count_of(lanes);
    warp_.each([&](int32_t lane) {
      if (!in(lanes, lane)) return;
      words_end_[rank_of(lanes, lane) - words_] = static_cast<uint16_t>(x_[lane]);
      x_[lane] >>= kWordBits;
    });
  }

  LIC_FAST_ANYWHERE void put_bits(const Each<Coded>& row, uint32_t active) {
    const uint32_t shifted = warp_.ballot([&](int32_t lane) { return in(active, lane) && row[lane].shift; });
    if (!shifted) return;
    put(warp_.ballot([&](int32_t lane) { return in(shifted, lane) && x_[lane] >> (32 - row[lane].shift); }));
    warp_.each([&](int32_t lane) {
      if (in(shifted, lane)) x_[lane] = x_[lane] << row[lane].shift | row[lane].raw;
    });
  }

  LIC_FAST_ANYWHERE void put_symbols(const Each<Coded>& row, uint32_t active) {
    const int32_t n = tables_.precision;
    put(warp_.ballot([&](int32_t lane) { return in(active, lane) && x_[lane] >> (32 - n) >= row[lane].frequency; }));
    warp_.each([&](int32_t lane) {
      if (!in(active, lane)) return;
      const uint32_t f = row[lane].frequency, quotient = divided(x_[lane], f, 1.0f / static_cast<float>(f));
      x_[lane] = (quotient << n) + (x_[lane] - quotient * f) + row[lane].start;
    });
  }

  Warp& warp_;
  const TableSet& tables_;
  const Layout layout_;
  uint16_t* const words_end_;
  int32_t* const escapes_end_;
  int64_t words_ = 0, escapes_ = 0, rows_ = 0;
  int32_t tail_rows_ = 0;
  bool in_tail_ = true;
  Each<uint32_t> x_;
  Each<int32_t> width_;  // of the lane's widest escape value
  Each<bool> outside_, lost_;
};

}  // namespace lic_fast::rans::warp
