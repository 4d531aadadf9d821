// Float loops that the compiler turns into each instruction set's vectors: included by isa_*.cpp alone.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "panel.hpp"

namespace tenfold {
namespace {

// Of the sizes of a block's floats. As integers NaN is more than infinity, so neither is overlooked.
inline float largest_of_block(const float* values) {
    int32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int k = 0; k < BLOCK; k++) largest = std::max(largest, std::bit_cast<int32_t>(values[k]) & 0x7fffffff);
    return std::bit_cast<float>(largest);
}

// What `round_block` makes of a block that holds infinity or NaN: every product with it is NaN.
inline float no_numbers(int8_t* codes, int32_t* correction) {
    std::fill_n(codes, BLOCK, int8_t{0});
    *correction = 0;
    return std::numeric_limits<float>::quiet_NaN();
}

// What values are multiplied by to fill -127..127. Of tiny ones it would be no number any more, and no
// product with those matters.
inline float inverse_of(float largest) { return largest > 1e-30f ? 127 / largest : 0; }

inline void each_to_bf16(const float* values, int count, uint16_t* out) {
    for (int i = 0; i < count; i++) out[i] = to_bf16(values[i]);
}

// e^x to 2 units in the last place for x in [-87, 88], e^-87 below, infinity above: 2^n times a polynomial
// on half a binade (minimax coefficients after Cephes' expf).
inline float exponential(float x) {
    const float within = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float shifted = within * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number
    const float n = shifted - 12582912.0f;
    float r = within - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t power = std::bit_cast<int32_t>(shifted) - 0x4b400000;
    return x > 88.0f ? std::numeric_limits<float>::infinity() : p * std::bit_cast<float>((power + 127) << 23);
}

void rms_norm(const float* x, const float* weight, int count, float eps, float* y) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < count; i++) sum += x[i] * x[i];
    const float inverse = 1.0f / std::sqrt(sum / static_cast<float>(count) + eps);
#pragma omp simd
    for (int i = 0; i < count; i++) y[i] = x[i] * inverse * weight[i];
}

float product(const float* a, const float* b, int count) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < count; i++) sum += a[i] * b[i];
    return sum;
}

float product_bf16(const uint16_t* a, const float* b, int count) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < count; i++) sum += std::bit_cast<float>(uint32_t{a[i]} << 16) * b[i];
    return sum;
}

void add_scaled(const float* x, float factor, int count, float* y) {
#pragma omp simd
    for (int i = 0; i < count; i++) y[i] += factor * x[i];
}

void swiglu(const float* gate, const float* up, int count, bool clamped, float* out) {
    if (!clamped) {
#pragma omp simd
        for (int i = 0; i < count; i++) out[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
        return;
    }
#pragma omp simd
    for (int i = 0; i < count; i++) {
        const float g = gate[i] > 7.0f ? 7.0f : gate[i];
        const float u = up[i] > 7.0f ? 7.0f : up[i] < -7.0f ? -7.0f : up[i];
        out[i] = g / (1.0f + exponential(-1.702f * g)) * (u + 1.0f);
    }
}

float largest(const float* values, int count) {
    float most = values[0];
#pragma omp simd reduction(max : most)
    for (int i = 1; i < count; i++) most = values[i] > most ? values[i] : most;
    return most;
}

float exponentials(float* values, int count, float largest) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < count; i++) {
        values[i] = exponential(values[i] - largest);
        sum += values[i];
    }
    return sum;
}

}  // namespace
}  // namespace tenfold
