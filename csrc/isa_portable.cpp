// Plain C++ for every machine: what the vector kernels are tested against, and ARM's path.
#include <cstring>

#include "floats.inl"
#include "isa.hpp"

namespace tenfold {
namespace {

template <Format F>
void dot(const uint8_t* panel, int blocks, const Tile& tile, const Ahead& ahead, float* out) {
    const uint8_t* scales = panel + blocks * code_bytes(F);
    std::fill_n(out, tile.tokens * ROWS, 0.0f);
    for (int b = 0; b < blocks; b++) {
        ahead.fetch(b);
        for (int row = 0; row < ROWS; row++) {
            int values[BLOCK];
            for (int k = 0; k < BLOCK; k++) values[k] = code_value(F, panel + b * code_bytes(F), row, k);
            const uint8_t byte = scales[b * ROWS + row];
            const float scale = F == Format::mxfp4 ? mxfp4_scale(byte) : block_scale(byte);
            for (int t = 0; t < tile.tokens; t++) {
                const int8_t* codes = tile.codes + (static_cast<size_t>(b) * tile.tokens + t) * BLOCK;
                int32_t whole = 0;
                for (int k = 0; k < BLOCK; k++) whole += values[k] * codes[k];
                out[t * ROWS + row] += static_cast<float>(whole) * (scale * tile.scales[b * tile.tokens + t]);
            }
        }
    }
    if constexpr (row_scale_bytes(F) > 0) {
        float row_scales[ROWS];
        std::memcpy(row_scales, scales + blocks * scale_bytes(F), sizeof row_scales);
        for (int i = 0; i < tile.tokens * ROWS; i++) out[i] *= row_scales[i % ROWS];
    }
}

void dot_bf16(const uint8_t* panel, int blocks, const Tile& tile, const Ahead&, float* out) {
    const uint16_t* weights = reinterpret_cast<const uint16_t*>(panel);
    for (int t = 0; t < tile.tokens; t++) {
        for (int row = 0; row < ROWS; row++) {
            float sum = 0;
            for (int b = 0; b < blocks; b++) {
                const uint16_t* x = tile.bf16 + (static_cast<size_t>(b) * tile.tokens + t) * BLOCK;
                const uint16_t* block = weights + static_cast<size_t>(b) * ROWS * BLOCK;
                for (int k = 0; k < BLOCK; k++)
                    sum += bf16_to_float(block[bf16_place(row, k)]) * bf16_to_float(x[k]);
            }
            out[t * ROWS + row] = sum;
        }
    }
}

float round_block(const float* values, int8_t* codes, int32_t* correction) {
    const float largest = largest_of_block(values);
    if (!std::isfinite(largest)) return no_numbers(codes, correction);
    const float inverse = inverse_of(largest);
    int32_t sum = 0;
    for (int k = 0; k < BLOCK; k++) {
        codes[k] = static_cast<int8_t>(std::nearbyint(values[k] * inverse));
        sum += codes[k];
    }
    *correction = -128 * sum;
    return largest / 127;
}

}  // namespace

extern const Kernels portable_kernels = {
    "portable",
    {dot_bf16, dot<Format::q8>, dot<Format::q4>, dot<Format::mxfp4>},
    round_block,
    each_to_bf16,
    rms_norm,
    product,
    product_bf16,
    add_scaled,
    swiglu,
    largest,
    exponentials,
};

}  // namespace tenfold
