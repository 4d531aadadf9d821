#include "latent.hpp"

#include <algorithm>

#include "norm.hpp"

namespace tenfold {

void LatentAttention::keep(Pool& pool, const Kernels& kernels, const Rope& rope, const Cache& cache,
                           const Places& places, const float* x) const {
    const int wide = heads.head_dim;
    Aligned<float> keys(static_cast<size_t>(places.tokens) * wide);
    linear(pool, kernels, {{kv_a.matrix, kv_a.bias, keys.data()}}, x, places.tokens);
    pool.run(places.tokens, 1, [&](size_t begin, size_t end) {
        for (size_t t = begin; t < end; t++) {
            float* key = &keys[t * wide];
            const int position = places.positions[t], block = places.blocks_of(t)[position / cache.block_size];
            kernels.rms_norm(key, kv_a_norm, rank, eps, key);
            rope.turn(key + rank, position);
            cache.write(kernels, block, 0, position % cache.block_size, key, key, wide);
        }
    });
}

void LatentAttention::ask(Pool& pool, const Kernels& kernels, const Rope& rope, const Cache& cache,
                          const Places& places, const float* x, float* y) const {
    const size_t tokens = places.tokens, H = heads.heads, wide = heads.head_dim, narrow = plain + rope.dims;
    Aligned<float> folded(tokens * H * wide), seen(tokens * H * wide), values(tokens * H * value);
    {
        const Aligned<float> asked = queries(pool, kernels, x, places.tokens);
        linear_by_head(pool, kernels, key_up, heads.heads, asked.data(), narrow, folded.data(), wide, places.tokens);
        pool.run(tokens * H, 16, [&](size_t begin, size_t end) {
            for (size_t i = begin; i < end; i++) {
                float* const turned = &folded[i * wide + rank];
                std::copy_n(&asked[i * narrow + plain], rope.dims, turned);
                rope.turn(turned, places.positions[i / H]);
            }
        });
    }
    attend(pool, kernels, heads, cache, folded.data(), places, nullptr, seen.data());
    linear_by_head(pool, kernels, value_up, heads.heads, seen.data(), wide, values.data(), value, places.tokens);
    linear(pool, kernels, {{o.matrix, o.bias, y}}, values.data(), places.tokens);
}

Aligned<float> LatentAttention::queries(Pool& pool, const Kernels& kernels, const float* x, int tokens) const {
    Aligned<float> out(static_cast<size_t>(tokens) * q.matrix.rows);
    if (!q_a) {
        linear(pool, kernels, {{q.matrix, q.bias, out.data()}}, x, tokens);
        return out;
    }
    const int rows = q_a->matrix.rows;
    Aligned<float> compressed(static_cast<size_t>(tokens) * rows);
    linear(pool, kernels, {{q_a->matrix, q_a->bias, compressed.data()}}, x, tokens);
    const Aligned<float> in = normed(pool, kernels, q_a_norm, rows, eps, compressed.data(), tokens);
    linear(pool, kernels, {{q.matrix, q.bias, out.data()}}, in.data(), tokens);
    return out;
}

}  // namespace tenfold
