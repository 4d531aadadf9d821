// Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), for prompts and decoding alike in the
// latent space: all heads share one key, the latent and what RoPE turns of it, and its latent is their value. The
// matrices that would expand it are folded into queries and outputs, (q W) . c in place of q . (W c).
#pragma once

#include <optional>

#include "attention.hpp"
#include "matmul.hpp"
#include "rope.hpp"

namespace tenfold {

struct LatentAttention {
    std::optional<Linear> q_a;  // to compressed queries, which q expands
    Linear q, kv_a, o;
    const float *q_a_norm = nullptr, *kv_a_norm = nullptr;
    Matrix key_up, value_up;  // the first head's, (rank, plain) and (value, rank); the others' follow, in whole panels
    Heads heads;              // of one key head, rank + rope.dims wide
    int rank = 0, plain = 0, value = 0;  // plain: what RoPE leaves of a query, which comes first
    float eps = 0;

    // Latents and turned keys of x (tokens, D), to the cache.
    void keep(Pool& pool, const Kernels& kernels, const Rope& rope, const Cache& cache, const Places& places,
              const float* x) const;
    // y (tokens, D): what tokens that were kept see.
    void ask(Pool& pool, const Kernels& kernels, const Rope& rope, const Cache& cache, const Places& places,
             const float* x, float* y) const;

private:
    // (tokens, heads, plain + rope.dims)
    Aligned<float> queries(Pool& pool, const Kernels& kernels, const float* x, int tokens) const;
};

}  // namespace tenfold
