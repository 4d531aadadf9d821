// AVX2: two registers of 8 rows. Products of unsigned and signed bytes saturate there, so the weights'
// signs move to the activations; no correction is needed then.
#include <immintrin.h>

#include "floats.inl"
#include "isa.hpp"

namespace tenfold {
namespace {

template <Format F>
inline __m256i signed_codebook() {
    const uint8_t* table = F == Format::q4 ? Q4_CODEBOOK : MXFP4_CODEBOOK;
    __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm256_broadcastsi128_si256(_mm_xor_si128(codes, _mm_set1_epi8(static_cast<char>(128))));
}

// The 8 groups of 4 columns for 8 rows: half 0 or 1 of each 64 bytes.
template <Format F>
inline void unpack(const uint8_t* block, int half, __m256i table, __m256i (&codes)[8]) {
    const __m256i low = _mm256_set1_epi8(15);
    if constexpr (F == Format::q8) {
        for (int g = 0; g < 8; g++) {
            auto at = reinterpret_cast<const __m256i*>(block + g * 64 + half * 32);
            codes[g] = _mm256_xor_si256(_mm256_loadu_si256(at), _mm256_set1_epi8(static_cast<char>(128)));
        }
    } else {
        for (int j = 0; j < 4; j++) {
            __m256i both =
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + j * 64 + half * 32));
            codes[2 * j] = _mm256_shuffle_epi8(table, _mm256_and_si256(both, low));
            codes[2 * j + 1] =
                _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(both, 4), low));
        }
    }
}

template <Format F>
inline __m256 block_scales(const uint8_t* bytes) {
    __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
    if constexpr (F == Format::mxfp4) {
        wide = _mm256_max_epi32(_mm256_sub_epi32(wide, _mm256_set1_epi32(1)), _mm256_setzero_si256());
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 23));
    } else {
        const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(wide, _mm256_set1_epi32(128)), 24);
        const __m256i size = _mm256_slli_epi32(_mm256_and_si256(wide, _mm256_set1_epi32(127)), 19);
        return _mm256_castsi256_ps(_mm256_or_si256(_mm256_add_epi32(size, _mm256_set1_epi32(SCALE_BIAS)), sign));
    }
}

template <Format F>
void dot(const uint8_t* panel, int blocks, const Tile& tile, const Ahead& ahead, float* out) {
    const __m256i table = F == Format::q8 ? _mm256_setzero_si256() : signed_codebook<F>();
    const __m256i ones = _mm256_set1_epi16(1);
    const uint8_t* scales = panel + blocks * code_bytes(F);
    const int T = tile.tokens;
    for (int half = 0; half < 2; half++) {
        __m256 sum[MAX_TOKENS];
        for (int t = 0; t < T; t++) sum[t] = _mm256_setzero_ps();
        for (int b = 0; b < blocks; b++) {
            if (half == 0) ahead.fetch(b);
            if (F == Format::q8 && half == 0 && T <= MEMORY_BOUND)  // 4 bits take longer to unpack than to come
                fetch_again<F>(panel + b * code_bytes(F));
            __m256i codes[8], sizes[8];
            unpack<F>(panel + b * code_bytes(F), half, table, codes);
            for (int g = 0; g < 8; g++) sizes[g] = _mm256_abs_epi8(codes[g]);
            const __m256 scale = block_scales<F>(scales + b * ROWS + half * 8);
            const int32_t* fours = reinterpret_cast<const int32_t*>(tile.codes + static_cast<size_t>(b) * T * BLOCK);
            for (int t = 0; t < T; t++) {
                __m256i whole = _mm256_setzero_si256();
                for (int g = 0; g < 8; g++) {
                    const __m256i turned = _mm256_sign_epi8(_mm256_set1_epi32(fours[t * 8 + g]), codes[g]);
                    const __m256i pairs = _mm256_maddubs_epi16(sizes[g], turned);
                    whole = _mm256_add_epi32(whole, _mm256_madd_epi16(pairs, ones));
                }
                const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(tile.scales[b * T + t]));
                sum[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), both, sum[t]);
            }
        }
        __m256 row_scales = _mm256_set1_ps(1);
        if constexpr (row_scale_bytes(F) > 0)
            row_scales = _mm256_loadu_ps(reinterpret_cast<const float*>(scales + blocks * scale_bytes(F)) + half * 8);
        for (int t = 0; t < T; t++)
            _mm256_storeu_ps(out + t * ROWS + half * 8, _mm256_mul_ps(sum[t], row_scales));
    }
}

void dot_bf16(const uint8_t* panel, int blocks, const Tile& tile, const Ahead& ahead, float* out) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    const int T = tile.tokens;
    for (int half = 0; half < 2; half++) {
        __m256 sum[MAX_TOKENS];
        for (int t = 0; t < T; t++) sum[t] = _mm256_setzero_ps();
        for (int b = 0; b < blocks; b++) {
            if (half == 0) ahead.fetch(b);
            const uint8_t* block = panel + b * code_bytes(Format::bf16) + half * 32;
            const int32_t* x = reinterpret_cast<const int32_t*>(tile.bf16 + static_cast<size_t>(b) * T * BLOCK);
            for (int pair = 0; pair < BLOCK / 2; pair++) {
                const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + pair * 64));
                const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(weights, 16));
                const __m256 second = _mm256_castsi256_ps(_mm256_and_si256(weights, upper));
                for (int t = 0; t < T; t++) {
                    const __m256i both = _mm256_set1_epi32(x[t * 16 + pair]);
                    sum[t] = _mm256_fmadd_ps(first, _mm256_castsi256_ps(_mm256_slli_epi32(both, 16)), sum[t]);
                    sum[t] = _mm256_fmadd_ps(second, _mm256_castsi256_ps(_mm256_and_si256(both, upper)), sum[t]);
                }
            }
        }
        for (int t = 0; t < T; t++) _mm256_storeu_ps(out + t * ROWS + half * 8, sum[t]);
    }
}

float round_block(const float* values, int8_t* codes, int32_t* correction) {
    const float largest = largest_of_block(values);
    if (!std::isfinite(largest)) return no_numbers(codes, correction);
    const __m256 inverse = _mm256_set1_ps(inverse_of(largest));
    __m256i whole[4];
    for (int i = 0; i < 4; i++)
        whole[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values + i * 8), inverse));
    const __m256i shorts[2] = {_mm256_packs_epi32(whole[0], whole[1]), _mm256_packs_epi32(whole[2], whole[3])};
    // Packing works on halves of a register: put the eight fours back in order.
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(shorts[0], shorts[1]),
                                                      _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), bytes);
    int32_t sum = 0;
    for (int k = 0; k < BLOCK; k++) sum += codes[k];
    *correction = -128 * sum;
    return largest / 127;
}

}  // namespace

extern const Kernels avx2_kernels = {
    "avx2",
    {dot_bf16, dot<Format::q8>, dot<Format::q4>, dot<Format::mxfp4>},
    round_block,
    each_to_bf16,
    rms_norm,
    product,
    product_bf16,
    add_scaled,
    swiglu,
    largest,
    exponentials,
};

}  // namespace tenfold
