// Sums of a row in the first-level cache, in an order that is the same in every SIMD variant.
#pragma once

#include <cstring>

#include "cpu/simd.h"

namespace lic_fast {

// kCount numbers at once: two registers of AVX-512, eight of the least instruction set.
template <class Acc>
struct SumLanes {
  static constexpr int64_t kCount = 128 / sizeof(Acc);
  typedef Acc Half __attribute__((vector_size(64)));
  Half low = {}, high = {};

  // Adds a[i] b[i], or a[i] without b, for kCount neighbours.
  LIC_FAST_INLINE void add(const Acc* a, const Acc* b) {
    Half first, second, by_first, by_second;
    std::memcpy(&first, a, sizeof first);
    std::memcpy(&second, a + kCount / 2, sizeof second);
    if (b) {
      std::memcpy(&by_first, b, sizeof first);
      std::memcpy(&by_second, b + kCount / 2, sizeof second);
      first *= by_first;
      second *= by_second;
    }
    low += first;
    high += second;
  }

  LIC_FAST_INLINE Acc total() const {
    Acc lane[kCount / 2];
    const Half both = low + high;
    std::memcpy(lane, &both, sizeof lane);
    for (int64_t half = kCount / 4; half; half /= 2) {
      for (int64_t j = 0; j < half; ++j) lane[j] += lane[j + half];
    }
    return lane[0];
  }
};

// n rounded up to what is summed at once, of fp32 and of fp64.
constexpr int64_t padded_for_sums(int64_t n) { return (n + 31) / 32 * 32; }

// Sum of a[i] b[i], or of a[i] without b. Both have room for padded_for_sums(n) numbers, zero from n on.
template <class Acc>
LIC_FAST_INLINE Acc sum_of(int64_t n, const Acc* a, const Acc* b) {
  SumLanes<Acc> lanes;
  for (int64_t i = 0; i < n; i += SumLanes<Acc>::kCount) lanes.add(a + i, b ? b + i : nullptr);
  return lanes.total();
}

}  // namespace lic_fast
