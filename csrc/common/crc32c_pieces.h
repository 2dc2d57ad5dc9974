// CRC-32C of data whose pieces are looked at side by side, as threads of a GPU do. Free of torch.
//
// The register is linear in it and in the data: it is the exclusive or of what each piece alone leaves, starting from 0
// and moved on by as many zero bytes as follow the piece, and of the initial register moved on by all. Moving on by n
// bytes is a multiplication by x^(8 n) modulo the polynomial; bit 31 is x^0.
#pragma once

#include <cstdint>

#include "common/choose.h"

namespace lic_fast::crc32c_pieces {

constexpr uint32_t kPolynomial = 0x82F63B78u;
constexpr int64_t kPieceBytes = 256;

LIC_FAST_ANYWHERE uint32_t with_bits(uint32_t crc, int32_t bits) {
  for (int32_t i = 0; i < bits; ++i) crc = (crc >> 1) ^ (crc & 1 ? kPolynomial : 0u);
  return crc;
}

LIC_FAST_ANYWHERE uint32_t product(uint32_t a, uint32_t b) {
  uint32_t sum = 0;
  for (; a; a <<= 1, b = with_bits(b, 1)) sum ^= a >> 31 ? b : 0u;
  return sum;
}

LIC_FAST_ANYWHERE uint32_t moved_on(uint32_t crc, int64_t bytes) {
  uint32_t power = 1u << (31 - 8);  // x^(8 * 2^k)
  for (; bytes; bytes >>= 1, power = product(power, power)) {
    if (bytes & 1) crc = product(crc, power);
  }
  return crc;
}

LIC_FAST_ANYWHERE int64_t pieces(int64_t bytes) { return (bytes + kPieceBytes - 1) / kPieceBytes; }

// What piece i of the data adds; table[b] is the register that byte b leaves. The first piece brings the initial
// register.
LIC_FAST_ANYWHERE uint32_t of_piece(const uint8_t* data, int64_t bytes, int64_t i, const uint32_t* table) {
  const int64_t begin = i * kPieceBytes, end = begin + kPieceBytes < bytes ? begin + kPieceBytes : bytes;
  uint32_t crc = i == 0 ? ~0u : 0u;
  for (int64_t at = begin; at < end; ++at) crc = (crc >> 8) ^ table[(crc ^ data[at]) & 255];
  return moved_on(crc, bytes - end);
}

}  // namespace lic_fast::crc32c_pieces
