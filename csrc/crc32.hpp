// CRC-32 as zlib, gzip and PNG have it, fast enough to check every record that is read.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tenfold {

uint32_t crc32(const uint8_t* data, size_t size);

}  // namespace tenfold
