// Building blocks for flat tensors that hold a part of the elements only: lic_fast/reference/_layout.py says how.
//
// A block of kBlock places is walked in pieces of kPiece, small enough that all dense buffers of a piece stay in the
// first-level cache: the compact values are spread out to one per element (expand), plain loops run over all elements
// with selects, and what changed is packed again (compress). Which elements have a place is read from the code bytes
// once a block, as bits.
#pragma once

#include <atomic>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace lic_fast {

constexpr int64_t kBlock = 1024;
constexpr int64_t kPiece = 128;
constexpr int64_t kWord = 64;
constexpr int64_t kWords = kBlock / kWord, kPieceWords = kPiece / kWord;
constexpr uint8_t kTied = 0x80, kStateless = 0x40, kOutside = 0x3F;
constexpr int64_t kModes = kOutside + 1;  // entries of a table of reference values: NaN where there is no mode

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words of code bytes are read whole");

// Of a block, or of a piece from word `first` on: a bit for each place.
struct Marks {
  uint64_t tied[kWords], state[kWords], inside[kWords];
};

LIC_FAST_INLINE int64_t count(const uint64_t* bits, int64_t words) {
  int64_t sum = 0;
  for (int64_t w = 0; w < words; ++w) sum += __builtin_popcountll(bits[w]);
  return sum;
}

LIC_FAST_INLINE bool any(const uint64_t* bits, int64_t words) {
  uint64_t all = 0;
  for (int64_t w = 0; w < words; ++w) all |= bits[w];
  return all != 0;
}

// The marks of kBlock code bytes.
template <class Isa>
struct Scan {
  static LIC_FAST_INLINE void run(const uint8_t* code, Marks& marks) {
    constexpr uint64_t kOnes = 0x0101010101010101u;
    const auto gathered = [](uint64_t bytes) { return (bytes & kOnes) * 0x0102040810204080u >> 56; };  // byte i: bit i
    for (int64_t w = 0; w < kWords; ++w) {
      uint64_t tied = 0, stateless = 0, outside = 0;
      for (int64_t i = 0; i < kWord; i += 8) {
        uint64_t bytes;
        std::memcpy(&bytes, code + w * kWord + i, sizeof bytes);
        tied |= gathered(bytes >> 7) << i;
        stateless |= gathered(bytes >> 6) << i;
        outside |= gathered(((bytes & (kOnes * kOutside)) + kOnes) >> 6) << i;  // 0x3F + 1 carries into bit 6
      }
      marks.tied[w] = tied;
      marks.state[w] = ~stateless;
      marks.inside[w] = ~outside;
    }
  }
};

// kPiece elements between their compact and their dense form. expand returns where the next piece's values begin and
// reads nothing from `end` on, where the block's values end; compress writes nothing from `end` on, where the piece's
// do.
template <class Isa, class T>
struct Compact {
  static LIC_FAST_INLINE const T* expand(const T* from, const T*, const uint64_t* bits, T* dense) {
    std::fill(dense, dense + kPiece, T(0));
    for (int64_t w = 0; w < kPieceWords; ++w) {
      for (uint64_t left = bits[w]; left; left &= left - 1) dense[w * kWord + __builtin_ctzll(left)] = *from++;
    }
    return from;
  }
  static LIC_FAST_INLINE void compress(T* to, const T*, const uint64_t* bits, const T* dense) {
    for (int64_t w = 0; w < kPieceWords; ++w) {
      for (uint64_t left = bits[w]; left; left &= left - 1) *to++ = dense[w * kWord + __builtin_ctzll(left)];
    }
  }
};

// values[i] = table[code[i] & kOutside], for a table of kModes entries; n <= kPiece.
template <class Isa, class T>
struct ModeTable {
  static LIC_FAST_INLINE void run(const T* table, const uint8_t* code, int64_t n, T* values) {
    for (int64_t i = 0; i < n; ++i) values[i] = table[code[i] & kOutside];
  }
};

#if defined(__x86_64__)
template <>
struct Scan<Avx512> {
  LIC_FAST_TARGET(LIC_FAST_AVX512)
  static void run(const uint8_t* code, Marks& marks) {
    const __m512i outside = _mm512_set1_epi8(kOutside);
    for (int64_t w = 0; w < kWords; ++w) {
      const __m512i bytes = _mm512_loadu_si512(code + w * kWord);
      marks.tied[w] = _mm512_movepi8_mask(bytes);
      marks.state[w] = ~_mm512_movepi8_mask(_mm512_add_epi8(bytes, bytes));
      marks.inside[w] = _mm512_cmpneq_epi8_mask(_mm512_and_si512(bytes, outside), outside);
    }
  }
};

template <>
struct Compact<Avx512, float> {
  static constexpr int64_t kLanes = 16;

  LIC_FAST_TARGET(LIC_FAST_AVX512)
  static const float* expand(const float* from, const float* end, const uint64_t* bits, float* dense) {
    for (int64_t i = 0; i < kPiece; i += kLanes) {
      const __mmask16 mask = static_cast<__mmask16>(bits[i / kWord] >> (i % kWord));
      // A full load where it stays inside the block: the masked one and the expanding one cost more.
      __m512 packed = from + kLanes <= end ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps(low(end - from), from);
      asm("" : "+v"(packed));  // else the compiler makes one expanding load of the two, which is slower
      _mm512_storeu_ps(dense + i, _mm512_maskz_expand_ps(mask, packed));
      from += _mm_popcnt_u32(mask);
    }
    return from;
  }

  // Stores whole registers where that stays inside the piece: what lies behind the packed values is stored over next.
  // Compressing in a register first: the compressing store is microcode on Zen 4 and 5.
  LIC_FAST_TARGET(LIC_FAST_AVX512)
  static void compress(float* to, const float* end, const uint64_t* bits, const float* dense) {
    for (int64_t i = 0; i < kPiece; i += kLanes) {
      const __mmask16 mask = static_cast<__mmask16>(bits[i / kWord] >> (i % kWord));
      const __m512 packed = _mm512_maskz_compress_ps(mask, _mm512_loadu_ps(dense + i));
      const int32_t n = _mm_popcnt_u32(mask);
      if (to + kLanes <= end) {
        _mm512_storeu_ps(to, packed);
      } else {
        _mm512_mask_storeu_ps(to, low(n), packed);
      }
      to += n;
    }
  }

 private:
  LIC_FAST_TARGET(LIC_FAST_AVX512) static LIC_FAST_INLINE __mmask16 low(int64_t n) {  // the n lowest lanes, n <= 16
    return static_cast<__mmask16>((1u << n) - 1);
  }
};

template <>
struct ModeTable<Avx512, float> {  // all entries live in four registers
  LIC_FAST_TARGET(LIC_FAST_AVX512)
  static void run(const float* table, const uint8_t* code, int64_t n, float* values) {
    const __m512 a = _mm512_loadu_ps(table), b = _mm512_loadu_ps(table + 16);
    const __m512 c = _mm512_loadu_ps(table + 32), d = _mm512_loadu_ps(table + 48);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
      const __m512i index = load16(code + i);  // permutex2var looks at the five lowest bits
      const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
      const __m512 first = _mm512_permutex2var_ps(a, index, b), second = _mm512_permutex2var_ps(c, index, d);
      _mm512_storeu_ps(values + i, _mm512_mask_blend_ps(upper, first, second));
    }
    for (; i < n; ++i) values[i] = table[code[i] & kOutside];
  }
};

// Where each of 8 lanes finds its value: expanding, and compressing, by the 8 bits of a mask.
struct Permutations {
  uint8_t expand[256][8] = {}, compress[256][8] = {};
  constexpr Permutations() {
    for (int mask = 0; mask < 256; ++mask) {
      for (int lane = 0, n = 0; lane < 8; ++lane) {
        if (!(mask >> lane & 1)) continue;
        expand[mask][lane] = static_cast<uint8_t>(n);
        compress[mask][n++] = static_cast<uint8_t>(lane);
      }
    }
  }
};
inline constexpr Permutations kPermutations;

template <>
struct Compact<Avx2, float> {
  static constexpr int64_t kLanes = 8;

  LIC_FAST_TARGET(LIC_FAST_AVX2)
  static const float* expand(const float* from, const float* end, const uint64_t* bits, float* dense) {
    for (int64_t i = 0; i < kPiece; i += kLanes) {  // lanes without a value get another's: no loop uses them
      const uint8_t mask = static_cast<uint8_t>(bits[i / kWord] >> (i % kWord));
      const __m256 packed = from + kLanes <= end ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, low(end - from));
      _mm256_storeu_ps(dense + i, _mm256_permutevar8x32_ps(packed, load8(kPermutations.expand[mask])));
      from += _mm_popcnt_u32(mask);
    }
    return from;
  }

  LIC_FAST_TARGET(LIC_FAST_AVX2)
  static void compress(float* to, const float* end, const uint64_t* bits, const float* dense) {
    for (int64_t i = 0; i < kPiece; i += kLanes) {
      const uint8_t mask = static_cast<uint8_t>(bits[i / kWord] >> (i % kWord));
      const __m256 packed = _mm256_permutevar8x32_ps(_mm256_loadu_ps(dense + i), load8(kPermutations.compress[mask]));
      const int32_t n = _mm_popcnt_u32(mask);
      if (to + kLanes <= end) {
        _mm256_storeu_ps(to, packed);  // what lies behind the packed values is stored over next
      } else {
        _mm256_maskstore_ps(to, low(n), packed);
      }
      to += n;
    }
  }

 private:
  LIC_FAST_TARGET(LIC_FAST_AVX2) static LIC_FAST_INLINE __m256i low(int64_t n) {  // the n lowest lanes
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};
#endif

}  // namespace lic_fast
