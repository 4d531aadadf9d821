// One decoder layer on some tokens: norm, attention, norm, feed-forward, each added to the residual stream.
#pragma once

#include "attention.hpp"
#include "experts.hpp"
#include "router.hpp"

namespace tenfold {

struct Linear {
    Matrix matrix;
    const float* bias = nullptr;
};

struct Attention {
    Linear q, k, v, o;
    Heads heads;
    const float *q_norm = nullptr, *k_norm = nullptr;  // null: none
    bool norm_per_head = false;                        // else over all heads at once
    int rotary_dim = 0;
    bool interleave = false;  // RoPE turns neighbours, which then leave in the order of halves
    float eps = 0;
};

struct SwiGLU {
    Linear gate_up, down;
};

struct FeedForward {
    SwiGLU dense;  // all of a dense layer, or the shared experts
    bool has_dense = false, has_experts = false;
    const float* dense_gate = nullptr;  // (D) or null: a sigmoid of x on the shared experts
    Router router;
    Experts experts;
};

// Where the tokens stand: sequences, positions, and the tables of cosines and sines (position, rotary_dim / 2).
struct Places {
    const int32_t *sequences, *positions;
    int tokens;
    const float *cos, *sin;
};

// y = x W_o applied to attention over x (tokens, D), after writing keys and values to the cache.
void run_attention(Pool& pool, const Kernels& kernels, const Attention& layer, const Cache& cache, const Places& places,
                   const float* x, float* y);

// y = feed-forward of x (tokens, D).
void run_feed_forward(Pool& pool, const Kernels& kernels, const FeedForward& layer, const float* x, int tokens,
                      int hidden, float* y);

}  // namespace tenfold
