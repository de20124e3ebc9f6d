// CRC-32 as zip and zlib have it: no change within 32 neighbouring bits goes unnoticed.
#pragma once

#include <cstdint>
#include <span>

namespace ctx {

// Of bytes that follow others, whose checksum is `before`.
uint32_t crc32(std::span<const char> bytes, uint32_t before = 0);

}  // namespace ctx
