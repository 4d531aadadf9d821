// How packed weights and rounded activations lie in memory. Nothing here depends on the machine.
//
// A matrix (N, K) is cut into panels of 16 rows, a panel into blocks of 32 columns; both are padded with
// zeros. A panel holds the codes of all its blocks, then their scale bytes, then (q8 and q4) a float32 scale
// for each row, a power of two, then zeros up to a multiple of 64 bytes. Within a block the codes of 4
// neighbouring columns (2 in bf16) of row 0 come first, then those of row 1, and so on: one vector register
// of 16 lanes is 16 rows, and one broadcast of 4 activations multiplies them all.
//
// tenfold/panels.py is the same layout in torch.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace tenfold {

constexpr int ROWS = 16;
constexpr int BLOCK = 32;
constexpr int MAX_TOKENS = 16;  // of one tile of activations

enum class Format : int { bf16 = 0, q8 = 1, q4 = 2, mxfp4 = 3 };
constexpr int FORMATS = 4;

constexpr size_t code_bytes(Format format) {  // of one block of a panel
    switch (format) {
        case Format::bf16: return ROWS * BLOCK * 2;
        case Format::q8: return ROWS * BLOCK;
        default: return ROWS * BLOCK / 2;
    }
}

constexpr size_t scale_bytes(Format format) { return format == Format::bf16 ? 0 : ROWS; }  // of one block

constexpr size_t row_scale_bytes(Format format) {  // of one panel
    return format == Format::q8 || format == Format::q4 ? ROWS * 4 : 0;
}

constexpr int blocks_of(int columns) { return (columns + BLOCK - 1) / BLOCK; }
constexpr int panels_of(int rows) { return (rows + ROWS - 1) / ROWS; }

constexpr size_t panel_bytes(Format format, int columns) {
    size_t bytes = blocks_of(columns) * (code_bytes(format) + scale_bytes(format)) + row_scale_bytes(format);
    return (bytes + 63) / 64 * 64;
}

// Codes are unsigned in memory: 128 is zero. These are the values of the 4-bit ones, plus 128.
constexpr uint8_t Q4_CODEBOOK[16] = {1,   33,  55,  71,  85,  97,  109, 119,
                                     128, 138, 149, 160, 174, 189, 207, 229};
// Twice the values of OCP's E2M1: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives.
constexpr uint8_t MXFP4_CODEBOOK[16] = {128, 129, 130, 131, 132, 134, 136, 140,
                                        128, 127, 126, 125, 124, 122, 120, 116};

// A scale byte is a float: a sign, 3 bits of exponent and 4 of mantissa, 1.9375 at most.
constexpr uint32_t SCALE_BIAS = (127u - 7) << 23;
inline float block_scale(uint8_t byte) {
    return std::bit_cast<float>(((uint32_t{byte} & 127) << 19) + SCALE_BIAS + ((uint32_t{byte} & 128) << 24));
}

// MXFP4's is a power of two, halved because its codebook is doubled.
inline float mxfp4_scale(uint8_t byte) { return std::ldexp(0.5f, byte - 127); }

// The value that a block's code stands for, before scales. Not for bf16.
inline int code_value(Format format, const uint8_t* block, int row, int column) {
    const int group = column / 4, c = column % 4;
    if (format == Format::q8) return block[group * 64 + row * 4 + c] - 128;
    const uint8_t both = block[(group / 2) * 64 + row * 4 + c];
    const uint8_t four = group % 2 ? both >> 4 : both & 15;
    return (format == Format::q4 ? Q4_CODEBOOK : MXFP4_CODEBOOK)[four] - 128;
}

// Where a panel in bf16 has the value of one of its rows in a column.
constexpr size_t bf16_place(int row, int column) {
    return static_cast<size_t>(column / 2) * ROWS * 2 + row * 2 + column % 2;
}

inline float bf16_to_float(uint16_t half) { return std::bit_cast<float>(uint32_t{half} << 16); }

inline uint16_t to_bf16(float value) {  // to nearest, ties to even
    uint32_t bits = std::bit_cast<uint32_t>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Activations of up to 16 tokens, rounded once and read by every panel: for each block of columns the 32
// values of each token. For weights in bf16 they are bf16, else 8-bit integers with one scale a block and
// token. `corrections` is what the unsigned codes of the weights add too much.
struct Tile {
    const int8_t* codes;         // (blocks, tokens, 32)
    const float* scales;         // (blocks, tokens)
    const int32_t* corrections;  // (blocks, tokens)
    const uint16_t* bf16;        // (blocks, tokens, 32)
    int tokens;
};

}  // namespace tenfold
