// Grouped-query attention over a KV cache that is kept as panels, so that scores and sums are the same
// products as any other matrix's.
#pragma once

#include <functional>

#include "isa.hpp"
#include "pool.hpp"

namespace tenfold {

// One layer's keys and values of some sequences, in bf16. For each sequence and key head, keys are a matrix
// (capacity, width): panels of 16 positions. Values are its transpose (width, capacity): panels of 16
// dimensions, blocks of 32 positions. `width` is head_dim rounded up to 32, `capacity` a multiple of 32.
// Unwritten places must be zero.
struct Cache {
    uint16_t *keys = nullptr, *values = nullptr;
    int capacity = 0, kv_heads = 0, width = 0;

    size_t head_size() const { return static_cast<size_t>(capacity) * width; }
    uint16_t* keys_of(int sequence, int head) const { return keys + (static_cast<size_t>(sequence) * kv_heads + head) * head_size(); }
    uint16_t* values_of(int sequence, int head) const { return values + (static_cast<size_t>(sequence) * kv_heads + head) * head_size(); }
    void write(int sequence, int head, int position, const float* key, const float* value, int head_dim) const;
};

struct Heads {
    int heads = 0, kv_heads = 0, head_dim = 0;
    float scale = 1;
    int window = 0;                // positions seen, the token's own included; 0 is all
    const float* sinks = nullptr;  // (heads) or null: a logit that takes weight and gives nothing
};

// out (tokens, heads * head_dim) for queries of the same shape. Token t belongs to sequence `sequences[t]`
// and stands at `positions[t]`; those of one sequence are neighbours. `prepare(t, kv_head)` makes the token's
// queries of that key head, and writes its key and value to the cache, where all before it are.
void attend(Pool& pool, const Kernels& kernels, const Heads& heads, const Cache& cache, const float* queries,
            const int32_t* sequences, const int32_t* positions, int tokens,
            const std::function<void(size_t, size_t)>& prepare, float* out);

}  // namespace tenfold
