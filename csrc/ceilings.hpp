// What this machine can do at most: how fast it reads memory, how fast it multiplies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace tenfold {

// Seconds in which `threads` threads together read through `bytes` of memory, which should be many times the caches.
double read_seconds(int threads, const uint8_t* from, size_t bytes);

// Operations a second of `threads` threads; a multiply-add is two. `kind` is "int8", "bf16" or "fp32",
// `isa` "avx512", "avx2" or "portable". 0 where the instruction set, or this machine, has none for it.
double peak(const std::string& kind, const std::string& isa, int threads);

}  // namespace tenfold
