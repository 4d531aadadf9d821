// What this machine can do at most: how fast it reads memory, how fast it multiplies.
#pragma once

#include <cstddef>
#include <string>

namespace tenfold {

// Bytes a second that `threads` threads read together, streaming through a buffer of `bytes`, which
// should be many times the caches. The best of several rounds; throws std::bad_alloc.
double read_bandwidth(int threads, size_t bytes);

// Operations a second of `threads` threads; a multiply-add is two. `kind` is "int8", "bf16" or "fp32",
// `isa` "avx512", "avx2" or "portable". 0 where the instruction set, or this machine, has none for it.
double peak(const std::string& kind, const std::string& isa, int threads);

}  // namespace tenfold
