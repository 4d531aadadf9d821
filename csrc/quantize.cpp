// Compiled without contraction of products and sums (CMakeLists.txt): every rounding is quantization.py's.
#include "quantize.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

// What glibc's loader chooses among. Other compilers, and GCC before 12, do not know these levels by name.
#if defined(TENFOLD_X86) && defined(__GLIBC__) && __GNUC__ >= 12 && !defined(__clang__)
#define EVERY_MACHINE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVERY_MACHINE
#endif

namespace tenfold {
namespace {

constexpr float SMALLEST_ROW_SCALE = 0x1p-100f;
constexpr int FIRST_STEP = -4, LAST_STEP = 5;  // of the scale codes tried around q8's

struct Codebook {
    float values[16], midpoints[15];  // ascending
    uint8_t codes[16];                // of those values
    int size;
};

Codebook ascending(const uint8_t* unsigned_values, bool drop_last_zero) {
    Codebook book{};
    for (int code = 0; code < 16; code++)
        if (!(drop_last_zero && code && unsigned_values[code] == 128)) book.codes[book.size++] = static_cast<uint8_t>(code);
    std::sort(book.codes, book.codes + book.size,
              [&](uint8_t a, uint8_t b) { return unsigned_values[a] < unsigned_values[b]; });
    for (int i = 0; i < book.size; i++) book.values[i] = static_cast<float>(unsigned_values[book.codes[i]] - 128);
    for (int i = 0; i + 1 < book.size; i++) book.midpoints[i] = (book.values[i] + book.values[i + 1]) / 2;
    // A list shorter than 16 never gets past its end.
    for (int i = book.size - 1; i < 15; i++) book.midpoints[i] = std::numeric_limits<float>::infinity();
    return book;
}

const Codebook Q4 = ascending(Q4_CODEBOOK, false), MXFP4 = ascending(MXFP4_CODEBOOK, true);

// A loop over the 32 weights within the loop over midpoints: so it becomes two vectors of 16.
EVERY_MACHINE void nearest(const float* x, float inverse, const Codebook& book, uint8_t* codes) {
    float y[BLOCK];
    int32_t place[BLOCK] = {};
    for (int k = 0; k < BLOCK; k++) y[k] = x[k] * inverse;
    for (int i = 0; i < 15; i++) {
        const float midpoint = book.midpoints[i];
        for (int k = 0; k < BLOCK; k++) place[k] += y[k] >= midpoint ? 1 : 0;
    }
    for (int k = 0; k < BLOCK; k++) codes[k] = book.codes[place[k]];
}

EVERY_MACHINE double squared_error(const float* x, float scale, const Codebook& book, const float* roots) {
    const float inverse = 1 / scale;
    float y[BLOCK], value[BLOCK];
    for (int k = 0; k < BLOCK; k++) {
        y[k] = x[k] * inverse;
        value[k] = book.values[0];
    }
    for (int i = 0; i < 15; i++) {
        const float midpoint = book.midpoints[i], above = book.values[i + 1];
        for (int k = 0; k < BLOCK; k++) value[k] = y[k] >= midpoint ? above : value[k];
    }
    double squares[BLOCK];
    for (int k = 0; k < BLOCK; k++) {
        float error = x[k] - scale * value[k];
        error *= roots[k];
        squares[k] = static_cast<double>(error) * static_cast<double>(error);
    }
    for (int half = BLOCK / 2; half; half /= 2)
        for (int k = 0; k < half; k++) squares[k] += squares[k + half];
    return squares[0];
}

float largest_of(const float* x, int count) {
    float largest = 0;
    for (int k = 0; k < count; k++) largest = std::max(largest, std::fabs(x[k]));
    return largest;
}

// The least positive scale byte that is no less than the largest |x| over 127.
int scale_code(const float* x) {
    const float scale = largest_of(x, BLOCK) / 127;
    const int32_t up = std::bit_cast<int32_t>(scale) + (1 << 19) - 1;
    return std::clamp((up >> 19) - (120 << 4), 0, 127);
}

struct Block {
    uint8_t codes[BLOCK];
    uint8_t scale;
};

void best(const float* x, const uint8_t* candidates, int count, float (*decode)(uint8_t), const Codebook& book,
          const float* roots, Block& out) {
    double least = std::numeric_limits<double>::infinity();
    out.scale = candidates[0];
    for (int i = 0; i < count; i++) {
        const double error = squared_error(x, decode(candidates[i]), book, roots);
        if (error < least) least = error, out.scale = candidates[i];
    }
    nearest(x, 1 / decode(out.scale), book, out.codes);
}

void quantize_q8(const float* x, Block& out) {
    out.scale = static_cast<uint8_t>(scale_code(x));
    const float inverse = 1 / block_scale(out.scale);
    for (int k = 0; k < BLOCK; k++)
        out.codes[k] = static_cast<uint8_t>(std::clamp(std::nearbyint(x[k] * inverse), -127.0f, 127.0f) + 128);
}

void quantize_q4(const float* x, const float* roots, Block& out) {
    uint8_t candidates[2 * (LAST_STEP - FIRST_STEP + 1)];
    int count = 0;
    const int near = scale_code(x);
    for (int sign : {0, 128})
        for (int step = FIRST_STEP; step <= LAST_STEP; step++)
            candidates[count++] = static_cast<uint8_t>(std::clamp(near + step, 0, 127) | sign);
    best(x, candidates, count, block_scale, Q4, roots, out);
}

float power_of_two(uint8_t byte) { return std::ldexp(1.0f, byte - 127); }

// `doubled` is twice the weights: the codebook is whole numbers, twice E2M1's.
void quantize_mxfp4(const float* weights, const float* doubled, const float* roots, Block& out) {
    const int exponent = (std::bit_cast<int32_t>(largest_of(weights, BLOCK)) >> 23) - 2;
    uint8_t candidates[2];
    for (int step : {0, 1}) candidates[step] = static_cast<uint8_t>(std::clamp(exponent + step, 0, 254));
    best(doubled, candidates, 2, power_of_two, MXFP4, roots, out);
}

void store(Format format, const Block& block, int row, uint8_t* to) {
    for (int k = 0; k < BLOCK; k++) {
        const int group = k / 4, c = k % 4;
        if (format == Format::q8)
            to[group * 64 + row * 4 + c] = block.codes[k];
        else
            to[(group / 2) * 64 + row * 4 + c] |= static_cast<uint8_t>(block.codes[k] << (group % 2 * 4));
    }
}

void quantize_row(Format format, const float* weights, int columns, const float* roots, int row, uint8_t* panel) {
    const int blocks = columns / BLOCK;
    uint8_t* scales = panel + blocks * code_bytes(format);
    float row_scale = 1;
    if (row_scale_bytes(format)) {
        const int32_t power = std::bit_cast<int32_t>(largest_of(weights, columns)) >> 23 << 23;
        row_scale = std::max(std::bit_cast<float>(power) / 64, SMALLEST_ROW_SCALE);
        std::memcpy(scales + blocks * ROWS + row * 4, &row_scale, 4);
    }
    for (int b = 0; b < blocks; b++) {
        float x[BLOCK];
        const float* from = weights + b * BLOCK;
        for (int k = 0; k < BLOCK; k++) x[k] = format == Format::mxfp4 ? 2 * from[k] : from[k] / row_scale;
        Block block;
        if (format == Format::q8)
            quantize_q8(x, block);
        else if (format == Format::q4)
            quantize_q4(x, roots + b * BLOCK, block);
        else
            quantize_mxfp4(from, x, roots + b * BLOCK, block);
        scales[b * ROWS + row] = block.scale;
        store(format, block, row, panel + b * code_bytes(format));
    }
}

void store_bf16(const float* weights, int columns, int row, uint8_t* panel) {
    uint16_t* halves = reinterpret_cast<uint16_t*>(panel);
    for (int k = 0; k < columns; k++) halves[bf16_place(row, k)] = to_bf16(weights[k]);
}

}  // namespace

void quantize(Pool& pool, Format format, const float* weights, int rows, int columns, const float* importance,
              uint8_t* panels) {
    std::vector<float> roots(columns, 1.0f);  // a product with one changes nothing
    if (importance)
        for (int k = 0; k < columns; k++) roots[k] = std::sqrt(importance[k]);
    pool.run(rows / ROWS, 1, [&](size_t begin, size_t end) {
        for (size_t p = begin; p < end; p++)
            for (int row = 0; row < ROWS; row++) {
                const float* from = weights + (p * ROWS + row) * columns;
                uint8_t* panel = panels + p * panel_bytes(format, columns);
                if (format == Format::bf16)
                    store_bf16(from, columns, row, panel);
                else
                    quantize_row(format, from, columns, roots.data(), row, panel);
            }
    });
}

}  // namespace tenfold
