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

#ifndef __CUDACC__
constexpr int64_t kPhiloxLanes = 16;

// 4 * kPhiloxLanes words from the block `counter` on. Plain loops over lanes, which the compiler vectorises.
LIC_FAST_ANYWHERE void philox_lanes(int64_t seed, uint64_t counter, uint32_t (&words)[4 * kPhiloxLanes]) {
  alignas(64) uint32_t c0[kPhiloxLanes], c1[kPhiloxLanes], c2[kPhiloxLanes], c3[kPhiloxLanes];
  for (int64_t l = 0; l < kPhiloxLanes; ++l) {
    c0[l] = static_cast<uint32_t>(counter + l);
    c1[l] = static_cast<uint32_t>((counter + l) >> 32);
    c2[l] = c3[l] = 0;
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  for (int32_t round = 0; round < kPhiloxRounds; ++round) {
    for (int64_t l = 0; l < kPhiloxLanes; ++l) {
      const uint64_t first = static_cast<uint64_t>(kPhiloxFactor0) * c0[l];
      const uint64_t second = static_cast<uint64_t>(kPhiloxFactor1) * c2[l];
      c0[l] = static_cast<uint32_t>(second >> 32) ^ c1[l] ^ k0;
      c2[l] = static_cast<uint32_t>(first >> 32) ^ c3[l] ^ k1;
      c1[l] = static_cast<uint32_t>(second);
      c3[l] = static_cast<uint32_t>(first);
    }
    k0 += kPhiloxStep0;
    k1 += kPhiloxStep1;
  }
  for (int64_t l = 0; l < kPhiloxLanes; ++l) {
    words[4 * l] = c0[l];
    words[4 * l + 1] = c1[l];
    words[4 * l + 2] = c2[l];
    words[4 * l + 3] = c3[l];
  }
}

// u[0, n): the noise of elements first, first + 1, ... of one row-major stretch.
template <class T>
LIC_FAST_ANYWHERE void uniform_stretch(int64_t seed, int64_t first, int64_t n, T* __restrict__ u) {
  int64_t done = 0;
  if (n <= 4) {  // one or two blocks: not worth 16 lanes
    T four[4];
    uniform4(seed, first, four);
    for (; done < n; ++done) u[done] = four[done];
    return;
  }
  while (done < n) {
    alignas(64) uint32_t words[4 * kPhiloxLanes];
    const int64_t skip = (first + done) & 3;
    philox_lanes(seed, static_cast<uint64_t>(first + done) >> 2, words);
    const int64_t left = n - done, room = 4 * kPhiloxLanes - skip, here = left < room ? left : room;
    if (here == 4 * kPhiloxLanes) {  // of constant length: whole vectors
      for (int64_t j = 0; j < 4 * kPhiloxLanes; ++j) u[done + j] = uniform<T>(words[j]);
    } else {
      for (int64_t j = 0; j < here; ++j) u[done + j] = uniform<T>(words[skip + j]);
    }
    done += here;
  }
}
#endif

}  // namespace lic_fast
