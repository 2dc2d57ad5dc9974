// The warp of common/rans_warp.h with its 32 lanes one after the other: what the GPU runs, for tests without one.
#pragma once

#include <memory>

#include "common/rans_warp_encode.h"
#include "cpu/rans_stream.h"

namespace lic_fast::rans::lockstep {

struct Warp {
  template <class T>
  struct Each {
    T of[32];
    T& operator[](int32_t lane) { return of[lane]; }
    const T& operator[](int32_t lane) const { return of[lane]; }
  };

  template <class Body>
  void each(const Body& body) const {
    for (int32_t lane = 0; lane < 32; ++lane) body(lane);
  }
  template <class Test>
  uint32_t ballot(const Test& test) const {
    uint32_t mask = 0;
    for (int32_t lane = 0; lane < 32; ++lane) mask |= static_cast<uint32_t>(test(lane) ? 1 : 0) << lane;
    return mask;
  }
  template <class T, class From>
  Each<T> shuffle(const Each<T>& values, const From& from) const {
    Each<T> result;
    for (int32_t lane = 0; lane < 32; ++lane) result[lane] = values[from(lane)];
    return result;
  }
  void sync() const {}

  int64_t queue[warp::kQueue];
};

template <class Source>
Status decode(const typename Source::Coding::TableSet& tables, const Layout& layout, const uint8_t* container,
              int64_t bytes, StreamState* state, Source source, int64_t count) {
  Warp warp;
  warp::Decoder<Warp, Source> decoder(warp, tables, layout, container, bytes, state);
  return decoder.run(source, static_cast<int32_t>(count));
}

// A share of a step into symbols, from what the other implementations take: indexes, or Mixtures.
template <class Elements, class TableSet>
Status decode_symbols(const TableSet& tables, const Layout& layout, const uint8_t* container, int64_t bytes,
                      StreamState* state, Elements elements, int32_t* symbols, int64_t count) {
  Status status = kDone;
  with_coding(elements, [&](const auto& by) {
    status = decode(tables, layout, container, bytes, state, Symbols<std::decay_t<decltype(by)>>{by, symbols}, count);
  });
  return status;
}

// All steps of one sample's stream w, into the coder that the other implementations fill too.
template <class Elements, class TableSet>
Status encode(const TableSet& tables, const Layout& layout, Elements of_sample, const int32_t* symbols,
              const int64_t* steps, int64_t count, int64_t w, StreamEncoder<Elements>* into) {
  int64_t elements = 0, end = 0;
  for (int64_t s = 0; s < count; ++s) elements += share_of(steps[s], layout, w).count, end += steps[s];
  const std::unique_ptr<uint16_t[]> words(new uint16_t[2 * elements]);
  const std::unique_ptr<int32_t[]> escapes(new int32_t[elements]);
  Status status = kDone;
  with_coding(of_sample, [&](const auto& by) {
    using By = std::decay_t<decltype(by)>;
    Warp warp;
    warp::Encoder<Warp, By> encoder(warp, tables, layout, words.get() + 2 * elements, escapes.get() + elements);
    for (int64_t s = count - 1; s >= 0; --s) {
      const Share share = share_of(steps[s], layout, w);
      end -= steps[s];
      encoder.add(Given<By>{by, symbols} + (end + share.first), share.count);
    }
    status = encoder.finish(&into->result);
  });
  into->words.reserve(into->result.words);
  into->words.at() -= into->result.words;
  std::memcpy(into->words.at(), words.get() + 2 * elements - into->result.words, 2 * into->result.words);
  for (int64_t i = 1; i <= into->result.escapes; ++i) into->escapes.put(escapes[elements - i]);
  return status;
}

}  // namespace lic_fast::rans::lockstep
