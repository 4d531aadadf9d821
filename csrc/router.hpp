// Which experts a token uses, and with what weight: model/router.py in C++, for inference.
#pragma once

#include "isa.hpp"
#include "pool.hpp"

namespace tenfold {

enum class Choice : int { softmax = 0, topk_softmax = 1, sigmoid = 2 };

struct Router {
    const float* weight = nullptr;          // (E, D), or null where it is kept in bf16
    const uint16_t* weight_bf16 = nullptr;
    const float* logit_bias = nullptr;      // (E) or null
    const float* selection_bias = nullptr;  // (E) or null; sigmoid only
    int experts = 0, hidden = 0, top_k = 0;
    Choice choice = Choice::softmax;
    bool renormalise = false;
    int groups = 1, top_groups = 1;
    float scale = 1;
};

// ids and weights (tokens, top_k) for x (tokens, D).
void route(Pool& pool, const Kernels& kernels, const Router& router, const float* x, int tokens, int32_t* ids,
           float* weights);

}  // namespace tenfold
