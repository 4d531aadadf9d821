// AVX-512 with VBMI, VNNI and BF16: 16 rows are the 16 lanes of a register, four products a lane at once.
#include <immintrin.h>

#include "floats.inl"
#include "isa.hpp"

namespace tenfold {
namespace {

constexpr int TOGETHER = 4;  // tokens whose sums are interleaved: one alone would wait for each product

template <Format F>
inline __m512i codebook() {
    const uint8_t* table = F == Format::q4 ? Q4_CODEBOOK : MXFP4_CODEBOOK;
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
}

template <Format F>
inline void unpack(const uint8_t* block, __m512i table, __m512i (&codes)[8]) {
    if constexpr (F == Format::q8) {
        for (int g = 0; g < 8; g++) codes[g] = _mm512_loadu_si512(block + g * 64);
    } else {
        // Of a byte only the low 6 bits choose, and the table repeats every 16: no need to clear the others.
        for (int j = 0; j < 4; j++) {
            const __m512i both = _mm512_loadu_si512(block + j * 64);
            codes[2 * j] = _mm512_permutexvar_epi8(both, table);
            codes[2 * j + 1] = _mm512_permutexvar_epi8(_mm512_srli_epi16(both, 4), table);
        }
    }
}

template <Format F>
inline __m512 block_scales(const uint8_t* bytes) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    if constexpr (F == Format::mxfp4) {
        // 2^(e - 127), halved because the codebook is doubled; below that is a denormal, flushed to zero.
        const __m512i wide =
            _mm512_max_epi32(_mm512_sub_epi32(_mm512_cvtepu8_epi32(packed), _mm512_set1_epi32(1)), _mm512_setzero_si512());
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 23));
    } else {
        // The exponent of SCALE_BIAS ends in three zeros, where a byte's own goes: (bits & kept) | bias.
        static_assert((SCALE_BIAS >> 23 & 7) == 0);
        const __m512i bits = _mm512_slli_epi32(_mm512_cvtepi8_epi32(packed), 19);
        const __m512i kept = _mm512_set1_epi32(static_cast<int>(0x83f80000));
        return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(bits, kept, _mm512_set1_epi32(SCALE_BIAS), 0xea));
    }
}

// The tokens are a template parameter so that their sums stay in registers.
template <Format F, int T>
void tile_dot(const uint8_t* panel, int blocks, const Tile& tile, const Ahead& ahead, float* out) {
    const __m512i table = codebook<F>();
    const uint8_t* scales = panel + blocks * code_bytes(F);
    const int32_t* fours = reinterpret_cast<const int32_t*>(tile.codes);
    __m512 sum[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) sum[t] = _mm512_setzero_ps();
    for (int b = 0; b < blocks; b++) {
        ahead.fetch(b);
        if constexpr (T <= MEMORY_BOUND) fetch_again<F>(panel + b * code_bytes(F));
        __m512i codes[8];
        unpack<F>(panel + b * code_bytes(F), table, codes);
        const __m512 scale = block_scales<F>(scales + b * ROWS);
        const int32_t* x = fours + static_cast<size_t>(b) * T * 8;
        const float* x_scales = tile.scales + b * T;
        const int32_t* corrections = tile.corrections + b * T;
#pragma GCC unroll 16
        for (int first = 0; first < T; first += TOGETHER) {
            __m512i whole[TOGETHER];
#pragma GCC unroll 4
            for (int i = 0; i < TOGETHER; i++)
                if (first + i < T) whole[i] = _mm512_set1_epi32(corrections[first + i]);
#pragma GCC unroll 8
            for (int g = 0; g < 8; g++)
#pragma GCC unroll 4
                for (int i = 0; i < TOGETHER; i++)
                    if (first + i < T)
                        whole[i] = _mm512_dpbusd_epi32(whole[i], codes[g], _mm512_set1_epi32(x[(first + i) * 8 + g]));
#pragma GCC unroll 4
            for (int i = 0; i < TOGETHER; i++)
                if (first + i < T)
                    sum[first + i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[i]),
                                                     _mm512_mul_ps(scale, _mm512_set1_ps(x_scales[first + i])),
                                                     sum[first + i]);
        }
    }
    __m512 row_scales = _mm512_set1_ps(1);
    if constexpr (row_scale_bytes(F) > 0) row_scales = _mm512_loadu_ps(scales + blocks * scale_bytes(F));
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) _mm512_storeu_ps(out + t * ROWS, _mm512_mul_ps(sum[t], row_scales));
}

// One sum a token whatever T is, so that its numbers do not depend on the tokens beside it. A single token then
// waits for each product, but still goes faster than memory.
template <int T>
void tile_dot_bf16(const uint8_t* panel, int blocks, const Tile& tile, const Ahead& ahead, float* out) {
    const int32_t* pairs = reinterpret_cast<const int32_t*>(tile.bf16);
    __m512 sum[T];
    for (int t = 0; t < T; t++) sum[t] = _mm512_setzero_ps();
    for (int b = 0; b < blocks; b++) {
        const uint8_t* block = panel + b * code_bytes(Format::bf16);
        const int32_t* x = pairs + static_cast<size_t>(b) * T * 16;
        ahead.fetch(b);
        if constexpr (T <= MEMORY_BOUND) fetch_again<Format::bf16>(block);
#pragma GCC unroll 16
        for (int pair = 0; pair < 16; pair++) {
            const __m512bh w = (__m512bh)_mm512_loadu_si512(block + pair * 64);
#pragma GCC unroll 16
            for (int t = 0; t < T; t++)
                sum[t] = _mm512_dpbf16_ps(sum[t], w, (__m512bh)_mm512_set1_epi32(x[t * 16 + pair]));
        }
    }
    for (int t = 0; t < T; t++) _mm512_storeu_ps(out + t * ROWS, sum[t]);
}

template <Format F, int T = MAX_TOKENS>
void dot(const uint8_t* panel, int blocks, const Tile& tile, const Ahead& ahead, float* out) {
    if (tile.tokens == T) {
        if constexpr (F == Format::bf16)
            tile_dot_bf16<T>(panel, blocks, tile, ahead, out);
        else
            tile_dot<F, T>(panel, blocks, tile, ahead, out);
    } else if constexpr (T > 1) {
        dot<F, T - 1>(panel, blocks, tile, ahead, out);
    }
}

float round_block(const float* values, int8_t* codes, int32_t* correction) {
    const float largest = largest_of_block(values);
    if (!std::isfinite(largest)) return no_numbers(codes, correction);
    const __m512 low = _mm512_loadu_ps(values), high = _mm512_loadu_ps(values + 16);
    const __m512 inverse = _mm512_set1_ps(inverse_of(largest));
    const __m512i first = _mm512_cvtps_epi32(_mm512_mul_ps(low, inverse));
    const __m512i second = _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtsepi32_epi8(first));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 16), _mm512_cvtsepi32_epi8(second));
    *correction = -128 * _mm512_reduce_add_epi32(_mm512_add_epi32(first, second));
    return largest / 127;
}

void round_bf16(const float* values, int count, uint16_t* out) {
    int i = 0;
    for (; i + 16 <= count; i += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                            (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(values + i)));
    each_to_bf16(values + i, count - i, out + i);
}

}  // namespace

extern const Kernels avx512_kernels = {
    "avx512",
    {dot<Format::bf16>, dot<Format::q8>, dot<Format::q4>, dot<Format::mxfp4>},
    round_block,
    round_bf16,
    rms_norm,
    product,
    product_bf16,
    add_scaled,
    swiglu,
    largest,
    exponentials,
};

}  // namespace tenfold
