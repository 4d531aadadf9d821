// What a set of kernels for one instruction set offers, and which sets this machine can run.
#pragma once

#include <string>
#include <vector>

#include "panel.hpp"

namespace tenfold {

// What to fetch while a panel is worked on, so much at each block: memory's own prefetcher stops at every
// page and is a block or two ahead, which is not enough to read at the speed of memory (LOG.md).
struct Ahead {
    const uint8_t* first = nullptr;
    int lines = 0;  // of 64 bytes a block
    const uint8_t* scales = nullptr;  // 16 bytes a block, or null

    // What goes with a block. Always inlined: GCC thinks that a call of what only fetches does nothing, and may
    // leave it out.
    [[gnu::always_inline]] void fetch(int block) const {
        if (scales && block % 4 == 0) __builtin_prefetch(scales + block * ROWS, 0, 2);
        const uint8_t* from = first + static_cast<size_t>(block) * lines * 64;
        for (int i = 0; i < lines; i++) __builtin_prefetch(from + i * 64, 0, 2);
    }
};

// With so few tokens to a tile, weights are wanted as fast as a processor can ask for them.
constexpr int MEMORY_BOUND = 4;

// Then one may forget what else it is told to fetch (an AMD EPYC does): what follows this block is asked for twice
// more, shortly before it is used (LOG.md). Beyond the panel that is mostly the next one; fetching what is not
// there does no harm.
template <Format F>
[[gnu::always_inline]] inline void fetch_again(const uint8_t* block) {
    for (size_t distance : {8 << 10, 4 << 10})
        for (size_t i = 0; i < code_bytes(F); i += 64) __builtin_prefetch(block + distance + i, 0, 2);
}

using Dot = void (*)(const uint8_t* panel, int blocks, const Tile& tile, const Ahead& ahead, float* out);

struct Kernels {
    const char* name;
    // out (tokens, 16): one panel of `blocks` blocks times a tile.
    Dot dot[FORMATS];
    // One block of 32 floats to codes; returns the scale, and -128 times the sum of the codes. Where one of
    // them is infinite or NaN, the scale is NaN.
    float (*round_block)(const float* values, int8_t* codes, int32_t* correction);
    // `count` floats to bf16.
    void (*round_bf16)(const float* values, int count, uint16_t* out);
    // y = x * weight / rms(x)
    void (*rms_norm)(const float* x, const float* weight, int count, float eps, float* y);
    float (*product)(const float* a, const float* b, int count);
    float (*product_bf16)(const uint16_t* a, const float* b, int count);
    // y += factor * x
    void (*add_scaled)(const float* x, float factor, int count, float* y);
    // out = silu(gate) * up, or gpt-oss's clamped form of it
    void (*swiglu)(const float* gate, const float* up, int count, bool clamped, float* out);
    // Of at least one value.
    float (*largest)(const float* values, int count);
    // values = exp(values - largest), summed
    float (*exponentials)(float* values, int count, float largest);
};

// The best this machine runs first; the last is portable C++.
std::vector<const Kernels*> supported_kernels();

// The kernels in use: the best, or those that the environment variable TENFOLD_ISA names.
// Throws std::invalid_argument for a name that is unknown or beyond this machine.
const Kernels& kernels();

}  // namespace tenfold
