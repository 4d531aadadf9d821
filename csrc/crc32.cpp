#include "crc32.hpp"

#include <array>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <vector>

#if defined(TENFOLD_X86)
#include <immintrin.h>
#endif

namespace tenfold {
namespace {

// Bits are reflected: bit 31 is x^0.
constexpr uint32_t POLYNOMIAL = 0xEDB88320;

constexpr uint32_t times_x(uint32_t value) { return (value >> 1) ^ (value & 1 ? POLYNOMIAL : 0); }

// Table k: what a byte becomes when k more bytes, all zero, have followed it.
constexpr auto TABLES = [] {
    std::array<std::array<uint32_t, 256>, 8> tables{};
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t value = byte;
        for (int bit = 0; bit < 8; bit++) value = times_x(value);
        tables[0][byte] = value;
    }
    for (int k = 1; k < 8; k++)
        for (int byte = 0; byte < 256; byte++) {
            const uint32_t before = tables[k - 1][byte];
            tables[k][byte] = (before >> 8) ^ tables[0][before & 255];
        }
    return tables;
}();

// Eight bytes at a time (Kounavis and Berry, "A Systematic Approach to Building High Performance
// Software-based CRC Generators", 2005).
uint32_t by_tables(uint32_t state, const uint8_t* data, size_t size) {
    for (; size >= 8; data += 8, size -= 8) {
        state ^= data[0] | data[1] << 8 | data[2] << 16 | static_cast<uint32_t>(data[3]) << 24;
        state = TABLES[7][state & 255] ^ TABLES[6][state >> 8 & 255] ^ TABLES[5][state >> 16 & 255] ^
                TABLES[4][state >> 24] ^ TABLES[3][data[4]] ^ TABLES[2][data[5]] ^ TABLES[1][data[6]] ^
                TABLES[0][data[7]];
    }
    for (; size; data++, size--) state = (state >> 8) ^ TABLES[0][(state ^ *data) & 255];
    return state;
}

uint32_t product(uint32_t a, uint32_t b) {
    uint32_t sum = 0;
    for (uint32_t bit = uint32_t{1} << 31; bit; bit >>= 1, b = times_x(b))
        if (a & bit) sum ^= b;
    return sum;
}

#if defined(TENFOLD_X86)

// x^n modulo the polynomial, in the place where a product without carries wants it.
constexpr long long power(int n) {
    uint32_t value = uint32_t{1} << 31;
    for (; n > 0; n--) value = times_x(value);
    return static_cast<long long>(static_cast<uint64_t>(value) << 1);
}

#define FOLDING __attribute__((target("pclmul,sse2")))

FOLDING inline __m128i load(const uint8_t* data) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
}

// What 128 bits amount to a number of bits further on, added to what is there.
FOLDING inline __m128i fold(__m128i value, __m128i powers, __m128i there) {
    const __m128i low = _mm_clmulepi64_si128(value, powers, 0x00), high = _mm_clmulepi64_si128(value, powers, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), there);
}

// Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel, 2009.
// At least 64 bytes; what is folded to the last 16 goes through the tables.
FOLDING uint32_t by_folding(uint32_t state, const uint8_t* data, size_t size) {
    constexpr long long FAR[] = {power(512 + 32), power(512 - 32)}, NEAR[] = {power(128 + 32), power(128 - 32)};
    const __m128i far = _mm_set_epi64x(FAR[1], FAR[0]), near = _mm_set_epi64x(NEAR[1], NEAR[0]);
    __m128i lanes[4];
    for (int i = 0; i < 4; i++) lanes[i] = load(data + 16 * i);
    lanes[0] = _mm_xor_si128(lanes[0], _mm_cvtsi32_si128(static_cast<int>(state)));
    for (data += 64, size -= 64; size >= 64; data += 64, size -= 64)
        for (int i = 0; i < 4; i++) lanes[i] = fold(lanes[i], far, load(data + 16 * i));
    __m128i lane = lanes[0];
    for (int i = 1; i < 4; i++) lane = fold(lane, near, lanes[i]);
    for (; size >= 16; data += 16, size -= 16) lane = fold(lane, near, load(data));
    alignas(16) uint8_t folded[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(folded), lane);
    return by_tables(by_tables(0, folded, 16), data, size);
}

#define WIDE_FOLDING __attribute__((target("vpclmulqdq,avx512f")))

WIDE_FOLDING inline __m512i fold_wide(__m512i value, __m512i powers, const uint8_t* data) {
    const __m512i low = _mm512_clmulepi64_epi128(value, powers, 0x00);
    const __m512i high = _mm512_clmulepi64_epi128(value, powers, 0x11);
    return _mm512_ternarylogic_epi64(low, high, _mm512_loadu_si512(data), 0x96);
}

// The same with four times the lanes. At least 256 bytes; 64 are left to `by_folding`.
WIDE_FOLDING uint32_t by_wide_folding(uint32_t state, const uint8_t* data, size_t size) {
    constexpr long long FAR[] = {power(2048 + 32), power(2048 - 32)}, NEAR[] = {power(512 + 32), power(512 - 32)};
    const __m512i far = _mm512_broadcast_i32x4(_mm_set_epi64x(FAR[1], FAR[0]));
    const __m512i near = _mm512_broadcast_i32x4(_mm_set_epi64x(NEAR[1], NEAR[0]));
    __m512i lanes[4];
    for (int i = 0; i < 4; i++) lanes[i] = _mm512_loadu_si512(data + 64 * i);
    lanes[0] = _mm512_xor_si512(lanes[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(state))));
    for (data += 256, size -= 256; size >= 256; data += 256, size -= 256)
        for (int i = 0; i < 4; i++) lanes[i] = fold_wide(lanes[i], far, data + 64 * i);
    alignas(64) uint8_t folded[256];
    for (int i = 0; i < 4; i++) _mm512_store_si512(folded + 64 * i, lanes[i]);
    __m512i lane = lanes[0];
    for (int i = 1; i < 4; i++) lane = fold_wide(lane, near, folded + 64 * i);
    for (; size >= 64; data += 64, size -= 64) lane = fold_wide(lane, near, data);
    _mm512_store_si512(folded, lane);
    return by_tables(by_folding(0, folded, 64), data, size);
}

#endif

using Way = uint32_t (*)(uint32_t state, const uint8_t* data, size_t size);

// The best this machine has, or that TENFOLD_ISA leaves.
Way best_way() {
#if defined(TENFOLD_X86)
    const char* isa = std::getenv("TENFOLD_ISA");
    const std::string_view wanted = isa ? isa : "";
    __builtin_cpu_init();
    if (wanted == "portable" || !__builtin_cpu_supports("pclmul")) return by_tables;
    const bool wide = __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("avx512f");
    return wide && wanted != "avx2" ? by_wide_folding : by_folding;
#else
    return by_tables;
#endif
}

uint32_t crc32_of_part(Way way, const uint8_t* data, size_t size) {
    return ~(size >= 256 ? way : by_tables)(~uint32_t{0}, data, size);  // what the widest needs
}

// What `size` bytes after them multiply the first ones by: x^(8 size).
uint32_t moved_by(size_t size) {
    uint32_t moved = uint32_t{1} << 31, square = uint32_t{1} << 23;  // 1 and x^8
    for (; size; size >>= 1, square = product(square, square))
        if (size & 1) moved = product(moved, square);
    return moved;
}

}  // namespace

uint32_t crc32(Pool& pool, const uint8_t* data, size_t size) {
    constexpr size_t PART = size_t{256} << 10;
    const size_t whole = size / PART, rest = size % PART;
    std::vector<uint32_t> parts(whole + 1);
    const Way way = best_way();
    pool.run(parts.size(), 1, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; i++) parts[i] = crc32_of_part(way, data + i * PART, i < whole ? PART : rest);
    });
    static const uint32_t by_part = moved_by(PART);
    uint32_t sum = 0;
    for (size_t i = 0; i < whole; i++) sum = product(sum, by_part) ^ parts[i];
    return product(sum, moved_by(rest)) ^ parts[whole];
}

}  // namespace tenfold
