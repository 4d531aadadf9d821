// RMS norm of all tokens' rows (Zhang and Sennrich 2019, arXiv:1910.07467), on all threads of a pool.
#pragma once

#include "aligned.hpp"
#include "isa.hpp"
#include "pool.hpp"

namespace tenfold {

// (tokens, width) of x.
inline Aligned<float> normed(Pool& pool, const Kernels& kernels, const float* norm, int width, float eps,
                             const float* x, int tokens) {
    Aligned<float> out(static_cast<size_t>(tokens) * width);
    pool.run(tokens, 8, [&](size_t begin, size_t end) {
        for (size_t t = begin; t < end; t++) kernels.rms_norm(x + t * width, norm, width, eps, &out[t * width]);
    });
    return out;
}

}  // namespace tenfold
