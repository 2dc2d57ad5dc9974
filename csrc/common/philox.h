// Philox4x32-10 (Salmon et al., SC 2011), the noise of the likelihoods: the same bits on every backend and device.
//
// Element i of a tensor, counted in row-major order whatever its layout, takes word i % 4 of the block whose counter is
// i / 4 and whose key is the seed. Nothing is kept between calls, so that a backward pass makes the noise again.
#pragma once

#include <cstdint>

#include "common/choose.h"

namespace lic_fast {

constexpr int32_t kPhiloxRounds = 10;
constexpr uint32_t kPhiloxFactor0 = 0xD2511F53u, kPhiloxFactor1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxStep0 = 0x9E3779B9u, kPhiloxStep1 = 0xBB67AE85u;

struct PhiloxBlock {
  uint32_t word[4];
};

LIC_FAST_ANYWHERE PhiloxBlock philox(int64_t seed, uint64_t counter) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  for (int32_t round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t first = static_cast<uint64_t>(kPhiloxFactor0) * c0;
    const uint64_t second = static_cast<uint64_t>(kPhiloxFactor1) * c2;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(second);
    c3 = static_cast<uint32_t>(first);
    k0 += kPhiloxStep0;
    k1 += kPhiloxStep1;
  }
  return {{c0, c1, c2, c3}};
}

// One of 2^24 values in (-0.5, 0.5), symmetric about 0 and exact in fp32.
template <class T>
LIC_FAST_ANYWHERE T uniform(uint32_t word) {
  return static_cast<T>(static_cast<int32_t>((word >> 8) << 1) + (1 - (1 << 24))) * static_cast<T>(1.0 / (1 << 25));
}

// The noise of element i alone.
template <class T>
LIC_FAST_ANYWHERE T uniform_at(int64_t seed, int64_t i) {
  const PhiloxBlock block = philox(seed, static_cast<uint64_t>(i) >> 2);
  const uint32_t low = i & 1 ? block.word[1] : block.word[0], high = i & 1 ? block.word[3] : block.word[2];
  return uniform<T>(i & 2 ? high : low);
}

// The noise of four neighbours from element i on; one block where i is a multiple of 4, else two.
template <class T>
LIC_FAST_ANYWHERE void uniform4(int64_t seed, int64_t i, T (&u)[4]) {
  const uint64_t counter = static_cast<uint64_t>(i) >> 2;
  const PhiloxBlock block = philox(seed, counter);
  if ((i & 3) == 0) {
    LIC_FAST_UNROLL
    for (int32_t j = 0; j < 4; ++j) u[j] = uniform<T>(block.word[j]);
    return;
  }
  const PhiloxBlock next = philox(seed, counter + 1);
  const int32_t skip = static_cast<int32_t>(i & 3);
  LIC_FAST_UNROLL
  for (int32_t j = 0; j < 4; ++j) {  // every place is a constant, so that the words stay in registers
    uint32_t word = 0;
    LIC_FAST_UNROLL
    for (int32_t k = 1; k < 4; ++k) {
      if (skip == k) word = j + k < 4 ? block.word[(j + k) & 3] : next.word[(j + k) & 3];
    }
    u[j] = uniform<T>(word);
  }
}

}  // namespace lic_fast
