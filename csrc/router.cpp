#include "router.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "aligned.hpp"

namespace tenfold {
namespace {

constexpr float NEVER = -std::numeric_limits<float>::infinity();

void softmax(const Kernels& kernels, float* values, int count) {
    const float sum = kernels.exponentials(values, count, kernels.largest(values, count));
    for (int e = 0; e < count; e++) values[e] /= sum;
}

// The indices of the `count` largest, largest first; the earlier of equals first. NaN is the largest.
std::vector<int32_t> top(const float* values, int size, int count) {
    std::vector<int32_t> order(size);
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + count, order.end(), [&](int32_t a, int32_t b) {
        const bool nan_a = std::isnan(values[a]), nan_b = std::isnan(values[b]);
        if (nan_a != nan_b) return nan_a;
        return nan_a || values[a] == values[b] ? a < b : values[a] > values[b];
    });
    order.resize(count);
    return order;
}

// Rule out the experts outside the groups whose best one (sigmoid: best two) sum highest.
void only_best_groups(const Router& router, float* ranked) {
    if (router.groups == 1) return;
    const int size = router.experts / router.groups;
    std::vector<float> best(router.groups);
    for (int g = 0; g < router.groups; g++)
        for (int32_t i : top(ranked + g * size, size, router.choice == Choice::sigmoid ? std::min(2, size) : 1))
            best[g] += ranked[g * size + i];
    const auto kept = top(best.data(), router.groups, router.top_groups);
    for (int g = 0; g < router.groups; g++)
        if (std::find(kept.begin(), kept.end(), g) == kept.end()) std::fill_n(ranked + g * size, size, NEVER);
}

void choose(const Kernels& kernels, const Router& router, float* scores, int32_t* ids, float* weights) {
    const int E = router.experts;
    if (router.choice == Choice::sigmoid)
        for (int e = 0; e < E; e++) scores[e] = 1 / (1 + std::exp(-scores[e]));
    else
        softmax(kernels, scores, E);
    std::vector<float> ranked(scores, scores + E);
    if (router.selection_bias)
        for (int e = 0; e < E; e++) ranked[e] += router.selection_bias[e];
    only_best_groups(router, ranked.data());
    const auto chosen = top(ranked.data(), E, router.top_k);
    float sum = 1e-20f;
    for (int32_t e : chosen) sum += scores[e];
    for (int k = 0; k < router.top_k; k++) {
        ids[k] = chosen[k];
        weights[k] = scores[chosen[k]] * router.scale / (router.renormalise ? sum : 1);
    }
}

}  // namespace

void route(Pool& pool, const Kernels& kernels, const Router& router, const float* x, int tokens, int32_t* ids,
           float* weights) {
    const int E = router.experts, D = router.hidden;
    Aligned<float> logits(static_cast<size_t>(tokens) * E);
    constexpr int SHARE = 8;  // experts of one token: a work item
    const int shares = (E + SHARE - 1) / SHARE;
    pool.run(static_cast<size_t>(tokens) * shares, tokens == 1 ? 1 : shares, [&](size_t begin, size_t end) {
        for (size_t item = begin; item < end; item++) {
            const size_t t = item / shares;
            const int first = static_cast<int>(item % shares) * SHARE;
            for (int e = first; e < std::min(E, first + SHARE); e++) {
                const size_t row = static_cast<size_t>(e) * D;
                const float logit = router.weight ? kernels.product(router.weight + row, x + t * D, D)
                                                  : kernels.product_bf16(router.weight_bf16 + row, x + t * D, D);
                logits[t * E + e] = logit + (router.logit_bias ? router.logit_bias[e] : 0);
            }
        }
    });
    pool.run(tokens, 8, [&](size_t begin, size_t end) {
        for (size_t t = begin; t < end; t++)
            choose(kernels, router, &logits[t * E], ids + t * router.top_k, weights + t * router.top_k);
    });
}

}  // namespace tenfold
