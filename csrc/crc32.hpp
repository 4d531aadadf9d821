// CRC-32 as zlib, gzip and PNG have it, fast enough to check every record that is computed with.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pool.hpp"

namespace tenfold {

uint32_t crc32(Pool& pool, const uint8_t* data, size_t size);

}  // namespace tenfold
