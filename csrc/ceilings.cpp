#include "ceilings.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tenfold {
namespace {

constexpr int ROUNDS = 7;
constexpr int CHAINS = 12;  // independent sums, more than the latency of a multiply-add times its ports

// Runs work(thread) on all threads at once; the seconds that the slowest took.
template <typename Work>
double seconds(int threads, const Work& work) {
    using clock = std::chrono::steady_clock;
    std::atomic<int> ready{0};
    std::vector<clock::time_point> first(threads), last(threads);
    auto timed = [&](int thread) {
        ready++;
        while (ready < threads) {}
        first[thread] = clock::now();
        work(thread);
        last[thread] = clock::now();
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; thread++) others.emplace_back(timed, thread);
    timed(0);
    for (auto& other : others) other.join();
    auto begin = *std::min_element(first.begin(), first.end());
    auto end = *std::max_element(last.begin(), last.end());
    return std::chrono::duration<double>(end - begin).count();
}

uint64_t sum_words(const uint64_t* words, size_t count) {
    uint64_t sums[8] = {};
    for (size_t i = 0; i + 8 <= count; i += 8) {
        for (int lane = 0; lane < 8; lane++) sums[lane] += words[i + lane];
    }
    uint64_t sum = 0;
    for (uint64_t lane : sums) sum += lane;
    return sum;
}

// The loops below keep CHAINS sums in registers and never touch memory. An empty asm that claims to
// change a value keeps the compiler from computing the sum beforehand. Each returns its operations.
#define LOOP(VECTOR, CONSTRAINT, OPERATIONS, STEP)                        \
    VECTOR sums[CHAINS] = {};                                             \
    for (size_t i = 0; i < steps; i++) {                                  \
        for (auto& sum : sums) {                                          \
            STEP;                                                         \
            asm volatile("" : "+" CONSTRAINT(sum));                       \
        }                                                                 \
    }                                                                     \
    return static_cast<double>(steps) * CHAINS * (OPERATIONS)

using Multiply = double (*)(size_t steps);

#if defined(__x86_64__)

__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) double int8_avx512(size_t steps) {
    __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(1);
    LOOP(__m512i, "v", 128, sum = _mm512_dpbusd_epi32(sum, a, b));
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) double bf16_avx512(size_t steps) {
    __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1), _mm512_set1_ps(1)), b = a;
    LOOP(__m512, "v", 64, sum = _mm512_dpbf16_ps(sum, a, b));
}

__attribute__((target("avx512f"))) double fp32_avx512(size_t steps) {
    __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(0.25f);
    LOOP(__m512, "v", 32, sum = _mm512_fmadd_ps(a, b, sum));
}

// Unsigned times signed bytes to pairs in 16 bits, pairs to 32 bits, and the sum: no VNNI needed.
__attribute__((target("avx2"))) double int8_avx2(size_t steps) {
    __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(1), ones = _mm256_set1_epi16(1);
    asm volatile("" : "+x"(a), "+x"(b));
    LOOP(__m256i, "x", 64,
         asm volatile("" : "+x"(a));
         sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones)));
}

__attribute__((target("avx2,fma"))) double fp32_avx2(size_t steps) {
    __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(0.25f);
    LOOP(__m256, "x", 16, sum = _mm256_fmadd_ps(a, b, sum));
}

Multiply fastest(const std::string& kind, const std::string& isa) {
    if (isa == "avx512" && __builtin_cpu_supports("avx512f")) {
        if (kind == "int8" && __builtin_cpu_supports("avx512vnni")) return int8_avx512;
        if (kind == "bf16" && __builtin_cpu_supports("avx512bf16")) return bf16_avx512;
        if (kind == "fp32") return fp32_avx512;
    }
    if (isa == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        if (kind == "int8") return int8_avx2;
        if (kind == "fp32") return fp32_avx2;
    }
    return nullptr;
}

#else
Multiply fastest(const std::string&, const std::string&) { return nullptr; }
#endif

// Whatever the compiler makes of plain loops for the least machine it builds for.
constexpr int LANES = 64;

double fp32_portable(size_t steps) {
    float sums[LANES] = {}, a[LANES];
    for (float& value : a) value = 0.5f;
    for (size_t i = 0; i < steps; i++) {
        for (int lane = 0; lane < LANES; lane++) sums[lane] += a[lane] * a[lane];
        asm volatile("" : : "r"(sums), "r"(a) : "memory");
    }
    return static_cast<double>(steps) * LANES * 2;
}

double int8_portable(size_t steps) {
    int8_t a[LANES], b[LANES];
    int32_t sum = 0;
    std::fill(a, a + LANES, 3);
    std::fill(b, b + LANES, 1);
    for (size_t i = 0; i < steps; i++) {
        asm volatile("" : : "r"(a), "r"(b) : "memory");
        for (int lane = 0; lane < LANES; lane++) sum += a[lane] * b[lane];
    }
    asm volatile("" : "+r"(sum));
    return static_cast<double>(steps) * LANES * 2;
}

Multiply portable(const std::string& kind) {
    if (kind == "int8") return int8_portable;
    return kind == "fp32" ? fp32_portable : nullptr;
}

}  // namespace

double read_seconds(int threads, const uint8_t* from, size_t bytes) {
    const size_t share = bytes / threads / 64 * 64;
    return seconds(threads, [&](int thread) {
        uint64_t sum = sum_words(reinterpret_cast<const uint64_t*>(from + thread * share), share / 8);
        asm volatile("" : "+r"(sum));
    });
}

double peak(const std::string& kind, const std::string& isa, int threads) {
    Multiply multiply = isa == "portable" ? portable(kind) : fastest(kind, isa);
    if (!multiply) return 0;
    constexpr size_t STEPS = 2'000'000;  // some ten milliseconds
    double best = 0;
    for (int round = 0; round < ROUNDS; round++) {
        std::vector<double> operations(threads);
        double took = seconds(threads, [&](int thread) { operations[thread] = multiply(STEPS); });
        best = std::max(best, operations[0] * threads / took);
    }
    return best;
}

}  // namespace tenfold
