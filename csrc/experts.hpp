// The experts of one layer: tokens sorted by expert, gate, up, activation, down and the weighted sum.
#pragma once

#include "matmul.hpp"
#include "store.hpp"

namespace tenfold {

// Record e is the pairs of gate and up panels (16 rows of gate, the same 16 of up), then the panels of
// down. Biases are (E, 2F) and (E, D) or null.
struct Experts {
    const uint8_t* records = nullptr;  // one after another, or null where they are a layer of a store
    size_t record_bytes = 0;
    Store* store = nullptr;
    int layer = 0;
    Format format = Format::bf16;
    int experts = 0, width = 0, hidden = 0;  // E, F, D
    const float *gate_up_bias = nullptr, *down_bias = nullptr;
    bool clamped = false;  // gpt-oss's activation
};

// out (tokens, D) = sum over k of weights[t, k] * expert[ids[t, k]](x[t]). An id of -1 is an empty slot.
// Every expert's weights are read once. The sums do not depend on the number of threads, nor on where the
// weights come from. Throws what Visit does.
void run_experts(Pool& pool, const Kernels& kernels, const Experts& layer, const float* x, int tokens,
                 const int32_t* ids, const float* weights, int top_k, float* out);

}  // namespace tenfold
