// Grouped-query attention over a KV cache that is kept as panels, so that scores and sums are the same
// products as any other matrix's.
#pragma once

#include <functional>

#include "isa.hpp"
#include "pool.hpp"

namespace tenfold {

// One layer's keys and values in bf16, in blocks of `block_size` positions, a multiple of 32, that belong to
// whichever sequence names them. In each block and for each key head, keys are a matrix (block_size, width):
// panels of 16 positions. Values are its transpose (width, block_size): panels of 16 dimensions, blocks of 32
// positions. `width` is head_dim rounded up to 32. What a sequence has not written must not be NaN.
struct Cache {
    uint16_t *keys = nullptr, *values = nullptr;
    int block_size = 0, kv_heads = 0, width = 0;

    uint16_t* keys_of(int block, int head) const { return keys + place(block, head); }
    uint16_t* values_of(int block, int head) const { return values + place(block, head); }
    void write(const Kernels& kernels, int block, int head, int offset, const float* key, const float* value,
               int head_dim) const;

private:
    size_t place(int block, int head) const {
        return (static_cast<size_t>(block) * kv_heads + head) * block_size * width;
    }
};

// Where tokens stand: token t at `positions[t]` of the sequence whose blocks, in order, are row `sequences[t]`
// of `tables`. Those of one sequence are neighbours.
struct Places {
    const int32_t* tables;
    int table_width;
    const int32_t *sequences, *positions;
    int tokens;

    const int32_t* blocks_of(size_t token) const {
        return tables + static_cast<size_t>(sequences[token]) * table_width;
    }
};

struct Heads {
    int heads = 0, kv_heads = 0, head_dim = 0;
    float scale = 1;
    int window = 0;                // positions seen, the token's own included; 0 is all
    const float* sinks = nullptr;  // (heads) or null: a logit that takes weight and gives nothing
};

// out (tokens, heads * head_dim) for queries of the same shape. `prepare(t, kv_head)` makes the token's
// queries of that key head, and writes its key and value to the cache, where all before it are, if they are not
// there; null where that was done. A token's numbers depend neither on the other tokens, nor on which blocks its
// sequence has.
void attend(Pool& pool, const Kernels& kernels, const Heads& heads, const Cache& cache, const float* queries,
            const Places& places, const std::function<void(size_t, size_t)>& prepare, float* out);

}  // namespace tenfold
