#include "layer.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

namespace tenfold {
namespace {

// Turn the first rotary_dim dimensions of a head; cos and sin are rows of rotary_dim / 2.
void turn(float* head, int rotary_dim, bool interleave, const float* cos, const float* sin) {
    const int half = rotary_dim / 2;
    if (!interleave) {
        for (int i = 0; i < half; i++) {
            const float a = head[i], b = head[half + i];
            head[i] = a * cos[i] - b * sin[i];
            head[half + i] = b * cos[i] + a * sin[i];
        }
        return;
    }
    std::vector<float> pairs(head, head + rotary_dim);
    for (int i = 0; i < half; i++) {
        const float a = pairs[2 * i], b = pairs[2 * i + 1];
        head[i] = a * cos[i] - b * sin[i];
        head[half + i] = b * cos[i] + a * sin[i];
    }
}

// Norm and RoPE of one token's queries or keys.
void prepare(const Kernels& kernels, const Attention& layer, const float* norm, int heads, float* row, const float* cos,
             const float* sin) {
    const int d = layer.heads.head_dim;
    if (norm && !layer.norm_per_head) kernels.rms_norm(row, norm, heads * d, layer.eps, row);
    for (int h = 0; h < heads; h++) {
        if (norm && layer.norm_per_head) kernels.rms_norm(row + h * d, norm, d, layer.eps, row + h * d);
        turn(row + h * d, layer.rotary_dim, layer.interleave, cos, sin);
    }
}

void run_swiglu(Pool& pool, const Kernels& kernels, const SwiGLU& layer, const float* x, int tokens, float* y) {
    const int F = layer.down.matrix.columns;
    std::vector<float> wide(static_cast<size_t>(tokens) * 2 * F), narrow(static_cast<size_t>(tokens) * F);
    linear(pool, kernels, {{layer.gate_up.matrix, layer.gate_up.bias, wide.data()}}, x, tokens);
    pool.run(tokens, 4, [&](size_t begin, size_t end) {
        for (size_t t = begin; t < end; t++)
            kernels.swiglu(&wide[t * 2 * F], &wide[t * 2 * F + F], F, false, &narrow[t * F]);
    });
    linear(pool, kernels, {{layer.down.matrix, layer.down.bias, y}}, narrow.data(), tokens);
}

}  // namespace

void run_attention(Pool& pool, const Kernels& kernels, const Attention& layer, const Cache& cache, const Places& places,
                   const float* x, float* y) {
    const Heads& heads = layer.heads;
    const int tokens = places.tokens, d = heads.head_dim, half = layer.rotary_dim / 2;
    const size_t wide = heads.heads * d, narrow = heads.kv_heads * d;
    std::vector<float> q(tokens * wide), k(tokens * narrow), v(tokens * narrow), out(tokens * wide);
    linear(pool, kernels,
           {{layer.q.matrix, layer.q.bias, q.data()},
            {layer.k.matrix, layer.k.bias, k.data()},
            {layer.v.matrix, layer.v.bias, v.data()}},
           x, tokens);
    pool.run(tokens, 4, [&](size_t begin, size_t end) {
        for (size_t t = begin; t < end; t++) {
            const int position = places.positions[t];
            const float *cos = places.cos + static_cast<size_t>(position) * half,
                        *sin = places.sin + static_cast<size_t>(position) * half;
            prepare(kernels, layer, layer.q_norm, heads.heads, &q[t * wide], cos, sin);
            prepare(kernels, layer, layer.k_norm, heads.kv_heads, &k[t * narrow], cos, sin);
            for (int h = 0; h < heads.kv_heads; h++)
                cache.write(places.sequences[t], h, position, &k[t * narrow + h * d], &v[t * narrow + h * d], d);
        }
    });
    attend(pool, kernels, heads, cache, q.data(), places.sequences, places.positions, tokens, out.data());
    linear(pool, kernels, {{layer.o.matrix, layer.o.bias, y}}, out.data(), tokens);
}

void run_feed_forward(Pool& pool, const Kernels& kernels, const FeedForward& layer, const float* x, int tokens,
                      int hidden, float* y) {
    if (!layer.has_experts) return run_swiglu(pool, kernels, layer.dense, x, tokens, y);
    const int K = layer.router.top_k;
    std::vector<int32_t> ids(static_cast<size_t>(tokens) * K);
    std::vector<float> weights(ids.size());
    route(pool, kernels, layer.router, x, tokens, ids.data(), weights.data());
    run_experts(pool, kernels, layer.experts, x, tokens, ids.data(), weights.data(), K, y);
    if (!layer.has_dense) return;
    std::vector<float> shared(static_cast<size_t>(tokens) * hidden);
    run_swiglu(pool, kernels, layer.dense, x, tokens, shared.data());
    for (int t = 0; t < tokens; t++) {
        const size_t at = static_cast<size_t>(t) * hidden;
        float gate = 1;
        if (layer.dense_gate) gate = 1 / (1 + std::exp(-kernels.product(x + at, layer.dense_gate, hidden)));
        kernels.add_scaled(&shared[at], gate, hidden, y + at);
    }
}

}  // namespace tenfold
