#include "core/checksum.h"

#include <array>

namespace ctx {
namespace {

// Eight bytes at a time: table[k][b] is the checksum of b with k zeros behind it.
constexpr auto kTables = [] {
  std::array<std::array<uint32_t, 256>, 8> tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t sum = byte;
    for (int bit = 0; bit < 8; ++bit) sum = (sum >> 1) ^ (sum & 1 ? 0xedb88320u : 0);
    tables[0][byte] = sum;
  }
  for (size_t k = 1; k < tables.size(); ++k) {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const uint32_t sum = tables[k - 1][byte];
      tables[k][byte] = (sum >> 8) ^ tables[0][sum & 255];
    }
  }
  return tables;
}();

}  // namespace

uint32_t crc32(std::span<const char> bytes, uint32_t before) {
  const auto* at = reinterpret_cast<const unsigned char*>(bytes.data());
  size_t size = bytes.size();
  uint32_t sum = ~before;
  for (; size >= 8; size -= 8, at += 8) {
    uint32_t next = 0;
    for (int i = 0; i < 4; ++i) next ^= kTables[7 - i][(at[i] ^ (sum >> (8 * i))) & 255];
    for (int i = 4; i < 8; ++i) next ^= kTables[7 - i][at[i]];
    sum = next;
  }
  for (; size > 0; --size, ++at) sum = (sum >> 8) ^ kTables[0][(sum ^ *at) & 255];
  return ~sum;
}

}  // namespace ctx
