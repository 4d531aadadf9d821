// Rotary position embedding (Su et al. 2021, arXiv:2104.09864).
#pragma once

#include <cstddef>
#include <vector>

namespace tenfold {

struct Rope {
    const float *cos = nullptr, *sin = nullptr;  // tables (position, dims / 2)
    int dims = 0;
    bool interleave = false;  // turns neighbours, which then leave in the order of halves

    // The first `dims` of a head.
    void turn(float* head, int position) const {
        const int half = dims / 2;
        const float *c = cos + static_cast<size_t>(position) * half, *s = sin + static_cast<size_t>(position) * half;
        const auto pair = [&](int i, float a, float b) {
            head[i] = a * c[i] - b * s[i];
            head[half + i] = b * c[i] + a * s[i];
        };
        if (!interleave) {
            for (int i = 0; i < half; i++) pair(i, head[i], head[half + i]);
            return;
        }
        const std::vector<float> pairs(head, head + dims);
        for (int i = 0; i < half; i++) pair(i, pairs[2 * i], pairs[2 * i + 1]);
    }
};

}  // namespace tenfold
