// CRC-32 as zlib, gzip and PNG have it, fast enough to check every record that is read.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tenfold {

uint32_t crc32(const uint8_t* data, size_t size);

// Of some bytes followed by `size` others, from the CRC-32 of each.
uint32_t joined_crc32(uint32_t first, uint32_t second, size_t size);

}  // namespace tenfold
