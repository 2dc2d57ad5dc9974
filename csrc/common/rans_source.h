// What the coders of common/rans_warp.h are told of an element, by kind: how it is coded, and where its symbol is found
// or left, as a symbol or as a value of a latent where it lies.
#pragma once

#include <type_traits>

#include "common/rans_mixture.h"

namespace lic_fast::rans {

// Elements of a sample's step, and places of a latent, are counted in 32 bits by GPUs, with room to count a little on.
constexpr int64_t kMostStep = (int64_t{1} << 31) - 1024;

// Coded by levels, or by scales that select one. Element is what coding takes, Fetched what is loaded ahead of it.
template <class Index>
struct ByLevel {
  using TableSet = Tables;
  using Fetched = Index;
  using Element = Level;
  static constexpr bool kSkips = true;
  static constexpr bool kScales = std::is_same_v<Index, float>;
  static constexpr int32_t kAhead = 4;  // rows
  const Index* index;

  LIC_FAST_ANYWHERE ByLevel operator+(int64_t n) const { return {index + n}; }
  LIC_FAST_ANYWHERE Fetched fetch(int64_t i) const { return index[i]; }
  LIC_FAST_ANYWHERE Element element(const Tables& tables, Fetched fetched, bool& outside) const {
    int32_t level = level_of(tables, fetched);
    if (static_cast<uint32_t>(level) >= static_cast<uint32_t>(tables.levels)) level = 0, outside = true;
    return tables.level[level];
  }
  LIC_FAST_ANYWHERE bool left_out(const Tables& tables, Fetched fetched, int32_t skip) const {
    return skipped(tables, level_of(tables, fetched), skip);
  }
};

// Coded by mixtures: of K components, loaded ahead into registers; of any number where K is 0, read where they lie.
template <int32_t K>
struct ByMixture {
  using TableSet = MixtureTables;
  using Element = std::conditional_t<K == 0, MixtureView, MixtureOf<K>>;
  using Fetched = Element;
  static constexpr bool kSkips = false;
  static constexpr bool kScales = false;
  static constexpr int32_t kAhead = 2;
  Mixtures all;

  LIC_FAST_ANYWHERE ByMixture operator+(int64_t n) const { return {all + n}; }
  LIC_FAST_ANYWHERE Fetched fetch(int64_t i) const { return Element(all, i); }
  LIC_FAST_ANYWHERE Element element(const MixtureTables&, Fetched fetched, bool& outside) const {
    if (!valid(fetched)) fetched.tame(), outside = true;
    return fetched;
  }
};

// Calls body with what says how these elements are coded.
template <class Index, class Body>
void with_coding(const Index* index, const Body& body) {
  body(ByLevel<Index>{index});
}
template <class Body>
void with_coding(const Mixtures& all, const Body& body) {
  switch (all.components) {
    case 1: return body(ByMixture<1>{all});
    case 2: return body(ByMixture<2>{all});
    case 3: return body(ByMixture<3>{all});
    case 4: return body(ByMixture<4>{all});
    default: body(ByMixture<0>{all});
  }
}

// Symbols to be encoded.
template <class By>
struct Given {
  using Coding = By;
  struct Fetched {
    typename By::Fetched code;
    int32_t symbol;
  };
  By by;
  const int32_t* symbols;

  LIC_FAST_ANYWHERE Given operator+(int64_t n) const { return {by + n, symbols + n}; }
  LIC_FAST_ANYWHERE Fetched fetch(int64_t i) const { return {by.fetch(i), symbols[i]}; }
};

// Where a decoder leaves symbols.
template <class By>
struct Symbols {
  using Coding = By;
  using Place = int32_t;
  using Fetched = typename By::Fetched;
  By by;
  int32_t* symbols;

  LIC_FAST_ANYWHERE int32_t place(int32_t i) const { return i; }
  LIC_FAST_ANYWHERE Fetched fetch(int32_t place) const { return by.fetch(place); }
  static LIC_FAST_ANYWHERE const typename By::Fetched& code(const Fetched& fetched) { return fetched; }
  LIC_FAST_ANYWHERE bool put(int32_t place, const Fetched&, int32_t symbol) const {
    symbols[place] = symbol;
    return true;
  }
};

// A latent of `room` places a sample: how element i is coded, its mean and its value all lie at places[i], or at i
// where there are no places. A place outside is not written, and put says so.
template <class By>
struct Values {
  using Coding = By;
  using Place = int32_t;
  struct Fetched {
    typename By::Fetched code;
    float mean;
  };
  By by;
  const float* means;
  const int32_t* places;
  float* values;
  int32_t first;  // of the share in the step
  int32_t room;

  LIC_FAST_ANYWHERE int32_t place(int32_t i) const { return places ? places[first + i] : first + i; }
  LIC_FAST_ANYWHERE bool inside(int32_t place) const { return place >= 0 && place < room; }
  LIC_FAST_ANYWHERE Fetched fetch(int32_t place) const {
    const int32_t at = inside(place) ? place : 0;
    return {by.fetch(at), means ? means[at] : 0.0f};
  }
  static LIC_FAST_ANYWHERE const typename By::Fetched& code(const Fetched& fetched) { return fetched.code; }
  LIC_FAST_ANYWHERE bool put(int32_t place, const Fetched& fetched, int32_t symbol) const {
    if (!inside(place)) return false;
    values[place] = value(symbol, fetched.mean);
    return true;
  }

  static LIC_FAST_ANYWHERE float value(int32_t symbol, float mean) { return static_cast<float>(symbol) + mean; }
};

}  // namespace lic_fast::rans
