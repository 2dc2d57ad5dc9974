// CRC-32C (Castagnoli), by the processor's instruction where it has one.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

namespace lic_fast {

namespace crc32c_detail {
using Row = std::array<uint32_t, 256>;

constexpr std::array<Row, 8> make_tables() {
  std::array<Row, 8> tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int32_t bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0x82F63B78u : 0u);
    tables[0][byte] = crc;
  }
  for (uint32_t byte = 0; byte < 256; ++byte) {
    for (int32_t t = 1; t < 8; ++t) tables[t][byte] = (tables[t - 1][byte] >> 8) ^ tables[0][tables[t - 1][byte] & 255];
  }
  return tables;
}
inline constexpr std::array<Row, 8> kTables = make_tables();

inline uint32_t in_software(uint32_t crc, const uint8_t* data, int64_t bytes) {
  for (; bytes >= 8; bytes -= 8, data += 8) {
    const uint32_t low = crc ^ (data[0] | data[1] << 8 | data[2] << 16 | static_cast<uint32_t>(data[3]) << 24);
    crc = kTables[7][low & 255] ^ kTables[6][low >> 8 & 255] ^ kTables[5][low >> 16 & 255] ^ kTables[4][low >> 24] ^
          kTables[3][data[4]] ^ kTables[2][data[5]] ^ kTables[1][data[6]] ^ kTables[0][data[7]];
  }
  for (; bytes > 0; --bytes) crc = (crc >> 8) ^ kTables[0][(crc ^ *data++) & 255];
  return crc;
}

#if defined(__x86_64__)
// The register after kChunk zero bytes, as four tables of its bytes: three chunks then run side by side.
constexpr int64_t kChunk = 1024;

constexpr std::array<Row, 4> make_shift() {
  std::array<uint32_t, 32> of_bit{};
  for (uint32_t bit = 0; bit < 32; ++bit) {
    uint32_t crc = 1u << bit;
    for (int64_t i = 0; i < kChunk; ++i) crc = (crc >> 8) ^ kTables[0][crc & 255];
    of_bit[bit] = crc;
  }
  std::array<Row, 4> shift{};
  for (uint32_t t = 0; t < 4; ++t) {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      for (uint32_t bit = 0; bit < 8; ++bit) shift[t][byte] ^= byte >> bit & 1 ? of_bit[8 * t + bit] : 0u;
    }
  }
  return shift;
}
inline constexpr std::array<Row, 4> kShift = make_shift();

inline uint32_t shifted(uint32_t crc) {
  return kShift[0][crc & 255] ^ kShift[1][crc >> 8 & 255] ^ kShift[2][crc >> 16 & 255] ^ kShift[3][crc >> 24];
}

__attribute__((target("sse4.2"))) inline uint32_t in_hardware(uint32_t crc, const uint8_t* data, int64_t bytes) {
  const auto word = [](const uint8_t* at) {
    uint64_t value;
    std::memcpy(&value, at, sizeof value);
    return value;
  };
  for (; bytes >= 3 * kChunk; bytes -= 3 * kChunk, data += 3 * kChunk) {
    uint64_t a = crc, b = 0, c = 0;
    for (int64_t i = 0; i < kChunk; i += 8) {
      a = __builtin_ia32_crc32di(a, word(data + i));
      b = __builtin_ia32_crc32di(b, word(data + kChunk + i));
      c = __builtin_ia32_crc32di(c, word(data + 2 * kChunk + i));
    }
    crc = shifted(shifted(static_cast<uint32_t>(a)) ^ static_cast<uint32_t>(b)) ^ static_cast<uint32_t>(c);
  }
  uint64_t rest = crc;
  for (; bytes >= 8; bytes -= 8, data += 8) rest = __builtin_ia32_crc32di(rest, word(data));
  crc = static_cast<uint32_t>(rest);
  for (; bytes > 0; --bytes) crc = __builtin_ia32_crc32qi(crc, *data++);
  return crc;
}
#endif
}  // namespace crc32c_detail

inline uint32_t crc32c(const uint8_t* data, int64_t bytes) {
#if defined(__x86_64__)
  static const bool instruction = __builtin_cpu_supports("sse4.2");
  if (instruction) return ~crc32c_detail::in_hardware(~0u, data, bytes);
#endif
  return ~crc32c_detail::in_software(~0u, data, bytes);
}

}  // namespace lic_fast
