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

// Norm (where it is per head) and RoPE of one head.
void prepare(const Kernels& kernels, const Attention& layer, const float* norm, float* head, const float* cos,
             const float* sin) {
    if (norm && layer.norm_per_head) kernels.rms_norm(head, norm, layer.heads.head_dim, layer.eps, head);
    turn(head, layer.rotary_dim, layer.interleave, cos, sin);
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

Floats normed(Pool& pool, const Kernels& kernels, const float* norm, int hidden, float eps, const float* x, int tokens) {
    Floats out(static_cast<size_t>(tokens) * hidden);
    pool.run(tokens, 8, [&](size_t begin, size_t end) {
        for (size_t t = begin; t < end; t++) kernels.rms_norm(x + t * hidden, norm, hidden, eps, &out[t * hidden]);
    });
    return out;
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

void DecoderLayer::run_feed_forward(Pool& pool, const Kernels& kernels, float* x, int tokens, int32_t* chosen) const {
    add(pool, kernels, post_norm, x, tokens,
        [&](const float* in, float* out) { feed(pool, kernels, in, tokens, chosen, out); });
}

void DecoderLayer::foresee(Pool& pool, const Kernels& kernels, const float* x, int tokens,
                           std::deque<Wanted>& experts) const {
    if (!feed_forward.has_experts) return;
    const Router& router = feed_forward.router;
    std::vector<int32_t> ids(static_cast<size_t>(tokens) * router.top_k);
    std::vector<float> weights(ids.size());
    const Floats in = normed(pool, kernels, post_norm, hidden, eps, x, tokens);
    route(pool, kernels, router, in.data(), tokens, ids.data(), weights.data());
    for (int32_t expert : ids)
        if (expert >= 0) experts.push_back({feed_forward.experts.layer, expert});
}

void DecoderLayer::attend(Pool& pool, const Kernels& kernels, const Cache& cache, const Places& places, const float* x,
                          float* y) const {
    const Attention& layer = attention;
    const Heads& heads = layer.heads;
    const int tokens = places.tokens, d = heads.head_dim, half = layer.rotary_dim / 2;
    const size_t wide = static_cast<size_t>(heads.heads) * d, narrow = static_cast<size_t>(heads.kv_heads) * d;
    Floats q(tokens * wide), k(tokens * narrow), v(tokens * narrow), out(tokens * wide);
    linear(pool, kernels,
           {{layer.q.matrix, layer.q.bias, q.data()},
            {layer.k.matrix, layer.k.bias, k.data()},
            {layer.v.matrix, layer.v.bias, v.data()}},
           x, tokens);
    if (layer.q_norm && !layer.norm_per_head) {
        pool.run(tokens, 8, [&](size_t begin, size_t end) {
            for (size_t t = begin; t < end; t++) {
                kernels.rms_norm(&q[t * wide], layer.q_norm, static_cast<int>(wide), layer.eps, &q[t * wide]);
                kernels.rms_norm(&k[t * narrow], layer.k_norm, static_cast<int>(narrow), layer.eps, &k[t * narrow]);
            }
        });
    }
    const int group = heads.heads / heads.kv_heads;
    const auto prepare_heads = [&](size_t t, size_t h) {
        const int position = places.positions[t];
        const float *c = cos + static_cast<size_t>(position) * half, *s = sin + static_cast<size_t>(position) * half;
        for (size_t g = h * group; g < (h + 1) * group; g++)
            prepare(kernels, layer, layer.q_norm, &q[t * wide + g * d], c, s);
        prepare(kernels, layer, layer.k_norm, &k[t * narrow + h * d], c, s);
        cache.write(kernels, places.blocks_of(t)[position / cache.block_size], static_cast<int>(h),
                    position % cache.block_size, &k[t * narrow + h * d], &v[t * narrow + h * d], d);
    };
    tenfold::attend(pool, kernels, heads, cache, q.data(), places, prepare_heads, out.data());
    linear(pool, kernels, {{layer.o.matrix, layer.o.bias, y}}, out.data(), tokens);
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
