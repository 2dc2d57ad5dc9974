// The noise of common/philox.h for a row-major stretch, by vectors: a 64-bit lane holds one counter's words.
#pragma once

#include "common/philox.h"
#include "cpu/vector_math.h"

namespace lic_fast {

template <class M>
struct StretchNoise {  // fp64: element by element
  static constexpr int64_t kSlack = 4;
  static LIC_FAST_INLINE int64_t fill(int64_t seed, int64_t first, int64_t n, typename M::Scalar* u) {
    for (int64_t i = 0; i < n; i += 4) {
      typename M::Scalar four[4];
      uniform4(seed, first + i, four);
      std::memcpy(u + i, four, sizeof four);
    }
    return 0;
  }
};

// fill writes whole blocks of Philox from u on, up to kSlack elements more than n, and returns the place in u of the
// noise of element `first`.
template <class Isa>
struct StretchNoise<VectorMath<Isa>> {
  using L = Lanes<Isa>;
  using Wide = typename L::Wide;
  static constexpr int64_t kCounters = kVectorBytes<Isa> / 8;
  static constexpr int64_t kSlack = 4 * kCounters + 4;

  static LIC_FAST_INLINE int64_t fill(int64_t seed, int64_t first, int64_t n, float* u) {
    const int64_t skip = first & 3;
    const uint64_t key = static_cast<uint64_t>(seed);
    Wide steps;
    for (int64_t l = 0; l < kCounters; ++l) steps[l] = l;
    uint64_t counter = static_cast<uint64_t>(first) >> 2;
    for (int64_t done = 0; done < n + skip; done += 4 * kCounters, counter += kCounters) {
      Wide c0 = steps + counter, c1 = c0 >> 32, c2 = Wide{}, c3 = Wide{};  // only the low halves count
      uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
      for (int32_t round = 0; round < kPhiloxRounds; ++round) {
        const Wide one = L::low_product(c0, kPhiloxFactor0), two = L::low_product(c2, kPhiloxFactor1);
        c0 = (two >> 32) ^ c1 ^ k0;
        c2 = (one >> 32) ^ c3 ^ k1;
        c1 = two;
        c3 = one;
        k0 += kPhiloxStep0;
        k1 += kPhiloxStep1;
      }
      const Wide low = (c0 & 0xFFFFFFFFu) | (c1 << 32), high = (c2 & 0xFFFFFFFFu) | (c3 << 32);
      store(u + done, L::first_pairs(low, high));
      store(u + done + 2 * kCounters, L::second_pairs(low, high));
    }
    return skip;
  }

  static LIC_FAST_INLINE void store(float* to, Wide words) {  // uniform() of each word
    using Integers = typename L::Integers;
    const Integers odd = Integers((typename L::Bits(words) >> 8) << 1) + (1 - (1 << 24));
    const typename L::Floats u = L::to_float(odd) * (1.0f / (1 << 25));
    std::memcpy(to, &u, sizeof u);
  }
};

// u[0, n): the noise of elements first, first + 1, ... and not one more.
template <class M>
LIC_FAST_INLINE void noise_stretch(int64_t seed, int64_t first, int64_t n, typename M::Scalar* u) {
  constexpr int64_t kPiece = 64;
  typename M::Scalar room[kPiece + StretchNoise<M>::kSlack];
  for (int64_t done = 0; done < n; done += kPiece) {
    const int64_t here = n - done < kPiece ? n - done : kPiece;
    const int64_t skip = StretchNoise<M>::fill(seed, first + done, here, room);
    std::memcpy(u + done, room + skip, here * sizeof *u);
  }
}

}  // namespace lic_fast
