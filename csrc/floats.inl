// Float loops that the compiler turns into each instruction set's vectors: included by isa_*.cpp alone.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

namespace tenfold {
namespace {

// e^x to 2 units in the last place for x in [-87, 88], clamped beyond: 2^n times a polynomial on half a
// binade (minimax coefficients after Cephes' expf).
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number
    const float n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t power = std::bit_cast<int32_t>(shifted) - 0x4b400000;
    return p * std::bit_cast<float>((power + 127) << 23);
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
