#include "layer.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "norm.hpp"

namespace tenfold {
namespace {

// A token's queries or keys, where their norm is not per head.
void norm_all_heads(const Kernels& kernels, const Attention& layer, const float* norm, float* row, size_t width) {
    if (norm && !layer.norm_per_head) kernels.rms_norm(row, norm, static_cast<int>(width), layer.eps, row);
}

// Norm (where it is per head) and RoPE of one head.
void prepare(const Kernels& kernels, const Attention& layer, const Rope& rope, const float* norm, float* head,
             int position) {
    if (norm && layer.norm_per_head) kernels.rms_norm(head, norm, layer.heads.head_dim, layer.eps, head);
    rope.turn(head, position);
}

void run_swiglu(Pool& pool, const Kernels& kernels, const SwiGLU& layer, const float* x, int tokens, float* y) {
    const int F = layer.down.matrix.columns;
    Floats wide(static_cast<size_t>(tokens) * 2 * F), narrow(static_cast<size_t>(tokens) * F);
    linear(pool, kernels, {{layer.gate_up.matrix, layer.gate_up.bias, wide.data()}}, x, tokens);
    pool.run(tokens, 4, [&](size_t begin, size_t end) {
        for (size_t t = begin; t < end; t++)
            kernels.swiglu(&wide[t * 2 * F], &wide[t * 2 * F + F], F, false, &narrow[t * F]);
    });
    linear(pool, kernels, {{layer.down.matrix, layer.down.bias, y}}, narrow.data(), tokens);
}

}  // namespace

template <class F>
void DecoderLayer::add(Pool& pool, const Kernels& kernels, const float* norm, float* x, int tokens, const F& f) const {
    const Floats in = normed(pool, kernels, norm, hidden, eps, x, tokens);
    Floats out(static_cast<size_t>(tokens) * hidden);
    f(in.data(), out.data());
    pool.run(tokens, 8, [&](size_t begin, size_t end) {
        for (size_t t = begin; t < end; t++) kernels.add_scaled(&out[t * hidden], residual, hidden, x + t * hidden);
    });
}

void DecoderLayer::run_attention(Pool& pool, const Kernels& kernels, const Cache& cache, const Places& places,
                                 float* x) const {
    add(pool, kernels, input_norm, x, places.tokens,
        [&](const float* in, float* out) { attend(pool, kernels, cache, places, in, out); });
}

void DecoderLayer::run_last_attention(Pool& pool, const Kernels& kernels, const Cache& cache, const Places& places,
                                      const std::vector<int32_t>& rows, float* x) const {
    const int tokens = places.tokens, count = static_cast<int>(rows.size());
    if (count == tokens) return run_attention(pool, kernels, cache, places, x);
    const Floats in = normed(pool, kernels, input_norm, hidden, eps, x, tokens);
    keep(pool, kernels, cache, places, in.data());
    if (count == 0) return;
    const size_t D = hidden;
    Floats asked(count * D), out(count * D);
    std::vector<int32_t> sequences, positions;
    for (int i = 0; i < count; i++) {
        std::copy_n(&in[rows[i] * D], D, &asked[i * D]);
        sequences.push_back(places.sequences[rows[i]]);
        positions.push_back(places.positions[rows[i]]);
    }
    const Places some{places.tables, places.table_width, sequences.data(), positions.data(), count};
    ask(pool, kernels, cache, some, asked.data(), out.data());
    for (int i = 0; i < count; i++) kernels.add_scaled(&out[i * D], residual, hidden, x + rows[i] * D);
}

void DecoderLayer::run_feed_forward(Pool& pool, const Kernels& kernels, float* x, int tokens, int32_t* chosen) const {
    add(pool, kernels, post_norm, x, tokens,
        [&](const float* in, float* out) { feed(pool, kernels, in, tokens, chosen, out); });
}

void DecoderLayer::foresee(Pool& pool, const Kernels& kernels, const float* x, int tokens, int eighths,
                           std::deque<Wanted>& experts) const {
    const Router& router = feed_forward.router;
    const int best = (router.top_k * eighths + 4) / 8;
    if (!feed_forward.has_experts || best == 0) return;
    std::vector<int32_t> ids(static_cast<size_t>(tokens) * router.top_k);
    std::vector<float> weights(ids.size());
    const Floats in = normed(pool, kernels, post_norm, hidden, eps, x, tokens);
    route(pool, kernels, router, in.data(), tokens, ids.data(), weights.data());
    for (int k = 0; k < best; k++)
        for (int t = 0; t < tokens; t++)
            if (const int32_t expert = ids[t * router.top_k + k]; expert >= 0)
                experts.push_back({feed_forward.experts.layer, expert});
}

void DecoderLayer::attend(Pool& pool, const Kernels& kernels, const Cache& cache, const Places& places, const float* x,
                          float* y) const {
    if (latent) {
        keep(pool, kernels, cache, places, x);
        return ask(pool, kernels, cache, places, x, y);
    }
    const Attention& layer = attention;
    const size_t tokens = places.tokens, wide = layer.q.matrix.rows, narrow = layer.k.matrix.rows;
    Floats q(tokens * wide), k(tokens * narrow), v(tokens * narrow), out(tokens * wide);
    linear(pool, kernels,
           {{layer.q.matrix, layer.q.bias, q.data()},
            {layer.k.matrix, layer.k.bias, k.data()},
            {layer.v.matrix, layer.v.bias, v.data()}},
           x, places.tokens);
    if (layer.q_norm && !layer.norm_per_head) {
        pool.run(tokens, 8, [&](size_t begin, size_t end) {
            for (size_t t = begin; t < end; t++) {
                norm_all_heads(kernels, layer, layer.q_norm, &q[t * wide], wide);
                norm_all_heads(kernels, layer, layer.k_norm, &k[t * narrow], narrow);
            }
        });
    }
    const auto prepare = [&](size_t t, size_t h) {
        ask_one(kernels, places, t, h, q.data());
        keep_one(kernels, cache, places, t, h, k.data(), v.data());
    };
    tenfold::attend(pool, kernels, layer.heads, cache, q.data(), places, prepare, out.data());
    linear(pool, kernels, {{layer.o.matrix, layer.o.bias, y}}, out.data(), places.tokens);
}

// The half of it that later tokens need.
void DecoderLayer::keep(Pool& pool, const Kernels& kernels, const Cache& cache, const Places& places,
                        const float* x) const {
    if (latent) return latent->keep(pool, kernels, rope, cache, places, x);
    const Attention& layer = attention;
    const size_t tokens = places.tokens, narrow = layer.k.matrix.rows, kv_heads = layer.heads.kv_heads;
    Floats k(tokens * narrow), v(tokens * narrow);
    linear(pool, kernels, {{layer.k.matrix, layer.k.bias, k.data()}, {layer.v.matrix, layer.v.bias, v.data()}}, x,
           places.tokens);
    pool.run(tokens, 1, [&](size_t begin, size_t end) {
        for (size_t t = begin; t < end; t++) {
            norm_all_heads(kernels, layer, layer.k_norm, &k[t * narrow], narrow);
            for (size_t h = 0; h < kv_heads; h++) keep_one(kernels, cache, places, t, h, k.data(), v.data());
        }
    });
}

// The other half, of tokens whose keys and values are in the cache.
void DecoderLayer::ask(Pool& pool, const Kernels& kernels, const Cache& cache, const Places& places, const float* x,
                       float* y) const {
    if (latent) return latent->ask(pool, kernels, rope, cache, places, x, y);
    const Attention& layer = attention;
    const size_t tokens = places.tokens, wide = layer.q.matrix.rows;
    Floats q(tokens * wide), out(tokens * wide);
    linear(pool, kernels, {{layer.q.matrix, layer.q.bias, q.data()}}, x, places.tokens);
    for (size_t t = 0; t < tokens; t++) norm_all_heads(kernels, layer, layer.q_norm, &q[t * wide], wide);
    const auto prepare = [&](size_t t, size_t h) { ask_one(kernels, places, t, h, q.data()); };
    tenfold::attend(pool, kernels, layer.heads, cache, q.data(), places, prepare, out.data());
    linear(pool, kernels, {{layer.o.matrix, layer.o.bias, y}}, out.data(), places.tokens);
}

// A token's key and value of one head.
void DecoderLayer::keep_one(const Kernels& kernels, const Cache& cache, const Places& places, size_t token,
                            size_t kv_head, float* k, const float* v) const {
    const size_t d = attention.heads.head_dim, at = (token * attention.heads.kv_heads + kv_head) * d;
    const int position = places.positions[token], block = places.blocks_of(token)[position / cache.block_size];
    prepare(kernels, attention, rope, attention.k_norm, k + at, position);
    cache.write(kernels, block, static_cast<int>(kv_head), position % cache.block_size, k + at, v + at,
                static_cast<int>(d));
}

// Its queries of that head.
void DecoderLayer::ask_one(const Kernels& kernels, const Places& places, size_t token, size_t kv_head, float* q) const {
    const Heads& heads = attention.heads;
    const size_t d = heads.head_dim, group = heads.heads / heads.kv_heads;
    const int position = places.positions[token];
    for (size_t g = kv_head * group; g < (kv_head + 1) * group; g++)
        prepare(kernels, attention, rope, attention.q_norm, q + (token * heads.heads + g) * d, position);
}

void DecoderLayer::feed(Pool& pool, const Kernels& kernels, const float* x, int tokens, int32_t* chosen,
                        float* y) const {
    const FeedForward& layer = feed_forward;
    if (!layer.has_experts) return run_swiglu(pool, kernels, layer.dense, x, tokens, y);
    const int K = layer.router.top_k;
    std::vector<int32_t> ids(static_cast<size_t>(tokens) * K);
    std::vector<float> weights(ids.size());
    route(pool, kernels, layer.router, x, tokens, ids.data(), weights.data());
    if (chosen) std::copy(ids.begin(), ids.end(), chosen);
    run_experts(pool, kernels, layer.experts, x, tokens, ids.data(), weights.data(), K, y);
    if (!layer.has_dense) return;
    Floats shared(static_cast<size_t>(tokens) * hidden);
    run_swiglu(pool, kernels, layer.dense, x, tokens, shared.data());
    for (int t = 0; t < tokens; t++) {
        const size_t at = static_cast<size_t>(t) * hidden;
        float gate = 1;
        if (layer.dense_gate) gate = 1 / (1 + std::exp(-kernels.product(x + at, layer.dense_gate, hidden)));
        kernels.add_scaled(&shared[at], gate, hidden, y + at);
    }
}

void Ending::run(Pool& pool, const Kernels& kernels, const float* x, int tokens, float* logits) const {
    const int D = linear.matrix.columns;
    const Floats in = normed(pool, kernels, norm, D, eps, x, tokens);
    tenfold::linear(pool, kernels, {{linear.matrix, linear.bias, logits}}, in.data(), tokens);
}

}  // namespace tenfold
