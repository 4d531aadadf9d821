// One decoder layer on some tokens: norm, attention, norm, feed-forward, each added to the residual stream.
#pragma once

#include <deque>
#include <optional>
#include <vector>

#include "aligned.hpp"
#include "attention.hpp"
#include "experts.hpp"
#include "latent.hpp"
#include "rope.hpp"
#include "router.hpp"

namespace tenfold {

using Floats = Aligned<float>;

struct Attention {
    Linear q, k, v, o;
    Heads heads;
    const float *q_norm = nullptr, *k_norm = nullptr;  // null: none
    bool norm_per_head = false;                        // else over all heads at once
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

// One layer; each half adds to the residual stream x (tokens, D): x += residual * f(norm(x)).
struct DecoderLayer {
    Attention attention;
    std::optional<LatentAttention> latent;  // in place of it
    FeedForward feed_forward;
    const float *input_norm = nullptr, *post_norm = nullptr;
    float eps = 0, residual = 1;
    int hidden = 0;
    Rope rope;

    const Heads& heads() const { return latent ? latent->heads : attention.heads; }
    // Writes the tokens' keys and values to the cache, too.
    void run_attention(Pool& pool, const Kernels& kernels, const Cache& cache, const Places& places, float* x) const;
    // The same for a last layer, after which only `rows` of x, in their order, are of use: others stay as they are.
    void run_last_attention(Pool& pool, const Kernels& kernels, const Cache& cache, const Places& places,
                            const std::vector<int32_t>& rows, float* x) const;
    // `chosen` is told which experts each token uses, (tokens, K), where it is not null and there are any.
    void run_feed_forward(Pool& pool, const Kernels& kernels, float* x, int tokens, int32_t* chosen) const;
    // Adds what this layer's router would choose if x did not change before its turn: of each token's experts the
    // best, as many eighths of them.
    void foresee(Pool& pool, const Kernels& kernels, const float* x, int tokens, int eighths,
                 std::deque<Wanted>& experts) const;

private:
    template <class F>
    void add(Pool& pool, const Kernels& kernels, const float* norm, float* x, int tokens, const F& f) const;
    void attend(Pool& pool, const Kernels& kernels, const Cache& cache, const Places& places, const float* x,
                float* y) const;
    void keep(Pool& pool, const Kernels& kernels, const Cache& cache, const Places& places, const float* x) const;
    void ask(Pool& pool, const Kernels& kernels, const Cache& cache, const Places& places, const float* x,
             float* y) const;
    void keep_one(const Kernels& kernels, const Cache& cache, const Places& places, size_t token, size_t kv_head,
                  float* k, const float* v) const;
    void ask_one(const Kernels& kernels, const Places& places, size_t token, size_t kv_head, float* q) const;
    void feed(Pool& pool, const Kernels& kernels, const float* x, int tokens, int32_t* chosen, float* y) const;
};

// What follows the last layer: its norm and the vocabulary's matrix.
struct Ending {
    Linear linear;
    const float* norm;
    float eps;

    // logits (tokens, vocabulary) of x (tokens, D).
    void run(Pool& pool, const Kernels& kernels, const float* x, int tokens, float* logits) const;
};

}  // namespace tenfold
