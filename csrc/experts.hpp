// The experts of one layer: tokens sorted by expert, gate, up, activation, down and the weighted sum.
#pragma once

#include "matmul.hpp"

namespace tenfold {

// Record e is the pairs of gate and up panels (16 rows of gate, the same 16 of up), then the panels of
// down. Biases are (E, 2F) and (E, D) or null.
struct Experts {
    const uint8_t* records = nullptr;
    size_t record_bytes = 0;
    Format format = Format::bf16;
    int experts = 0, width = 0, hidden = 0;  // E, F, D
    const float *gate_up_bias = nullptr, *down_bias = nullptr;
    bool clamped = false;  // gpt-oss's activation

    const uint8_t* record(int expert) const { return records + expert * record_bytes; }
};

// out (tokens, D) = sum over k of weights[t, k] * expert[ids[t, k]](x[t]). An id of -1 is an empty slot.
// Every expert's weights are read once. The sums do not depend on the number of threads.
void run_experts(Pool& pool, const Kernels& kernels, const Experts& layer, const float* x, int tokens,
                 const int32_t* ids, const float* weights, int top_k, float* out);

}  // namespace tenfold
