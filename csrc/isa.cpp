#include "isa.hpp"

#include <cstdlib>
#include <stdexcept>

namespace tenfold {

extern const Kernels portable_kernels;
#if defined(TENFOLD_X86)
extern const Kernels avx2_kernels, avx512_kernels;
#endif

std::vector<const Kernels*> supported_kernels() {
    std::vector<const Kernels*> found;
#if defined(TENFOLD_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
        __builtin_cpu_supports("avx512bf16"))
        found.push_back(&avx512_kernels);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2_kernels);
#endif
    found.push_back(&portable_kernels);
    return found;
}

const Kernels& kernels() {
    const char* wanted = std::getenv("TENFOLD_ISA");
    const auto found = supported_kernels();
    if (!wanted || !*wanted) return *found.front();
    std::string names;
    for (const Kernels* set : found) {
        if (set->name == std::string(wanted)) return *set;
        names += (names.empty() ? "" : ", ") + std::string(set->name);
    }
    throw std::invalid_argument("TENFOLD_ISA: this machine cannot run '" + std::string(wanted) + "', only " + names);
}

}  // namespace tenfold
