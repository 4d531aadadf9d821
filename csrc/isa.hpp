// What a set of kernels for one instruction set offers, and which sets this machine can run.
#pragma once

#include <string>
#include <vector>

#include "panel.hpp"

namespace tenfold {

struct Kernels {
    const char* name;
    // out (tokens, 16): one panel of `blocks` blocks times a tile.
    void (*dot[FORMATS])(const uint8_t* panel, int blocks, const Tile& tile, float* out);
    // One block of 32 floats to codes; returns the scale, and -128 times the sum of the codes.
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
    // values = exp(values - largest), summed
    float (*exponentials)(float* values, int count, float largest);
};

// The best this machine runs first; the last is portable C++.
std::vector<const Kernels*> supported_kernels();

// The kernels in use: the best, or those that the environment variable TENFOLD_ISA names.
// Throws std::invalid_argument for a name that is unknown or beyond this machine.
const Kernels& kernels();

}  // namespace tenfold
