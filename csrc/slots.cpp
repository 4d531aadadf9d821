#include "slots.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <utility>

namespace tenfold {

constexpr size_t HUGE_PAGE = size_t{2} << 20;
// Tokens after which a use counts half, as in tenfold/trace/simulate.py.
constexpr double HALF_LIFE = 32;
// Of what was foreseen, the last that count for how sure that is, and the least it is taken for: it must be tried, to
// be seen to come true.
constexpr double FORESEEN = 32, LEAST_SURE = 0.1;
// Of an expert that no token chose, as far as is remembered.
constexpr double RARE = 1e-6;

Arena::Arena(size_t bytes) : bytes_(bytes + HUGE_PAGE) {
    mapped_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped_ == MAP_FAILED) throw std::bad_alloc();
    const uintptr_t address = reinterpret_cast<uintptr_t>(mapped_);
    first_ = reinterpret_cast<uint8_t*>((address + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
#if defined(__linux__)
    madvise(mapped_, bytes_, MADV_HUGEPAGE);
    madvise(mapped_, bytes_, MADV_DONTFORK);
#endif
}

Arena::~Arena() { munmap(mapped_, bytes_); }

Slots::Slots(const std::vector<int>& experts, size_t count) : slots_(count) {
    for (int E : experts) {
        places_.emplace_back(E, -1);
        frequencies_.push_back({std::vector<double>(E), 0});
    }
}

void Slots::count(int layer, const std::vector<int>& uses, int tokens) {
    layer_ = layer;
    Frequency& frequency = frequencies_[layer];
    const double faded = std::exp2(-tokens / HALF_LIFE);
    for (size_t e = 0; e < uses.size(); e++) {
        frequency.uses[e] = frequency.uses[e] * faded + uses[e];
        if (places_[layer][e] < 0) continue;
        if (std::exchange(slots_[places_[layer][e]].foreseen, false)) sure_ += ((uses[e] > 0) - sure_) / FORESEEN;
    }
    frequency.tokens = frequency.tokens * faded + tokens;
}

// Of a layer: in tokens from now.
double Slots::turn(int layer) const {
    const int layers = static_cast<int>(places_.size());
    return static_cast<double>((layer - layer_ - 1 + layers) % layers) / layers;
}

// In tokens from now, expected: each chooses the expert with the probability that recent ones did, or that what was
// foreseen came true, when the layer's turn comes, for the layers take turns. So the cheapest loss among equals is of
// the layer just done.
double Slots::next_use(const Slot& slot) const {
    const Frequency& frequency = frequencies_[slot.layer];
    const double recent = frequency.tokens > 0 ? frequency.uses[slot.expert] / frequency.tokens : 0;
    const double chance = slot.foreseen ? std::max(sure_, LEAST_SURE) : recent;
    return 1 / std::max(chance, RARE) - 1 + turn(slot.layer);
}

int Slots::place(int layer, int expert, bool foreseen) {
    int last = -1;
    double latest = foreseen ? next_use({.layer = layer, .expert = expert, .foreseen = true}) : -1;
    for (size_t s = 0; s < slots_.size(); s++) {
        const Slot& slot = slots_[s];
        if (slot.in_use) continue;
        const double use = slot.layer < 0 ? std::numeric_limits<double>::infinity() : next_use(slot);
        if (use > latest) latest = use, last = static_cast<int>(s);
    }
    if (last < 0) return -1;
    clear(last);
    slots_[last] = {layer, expert, false, false, true, foreseen};
    places_[layer][expert] = last;
    return last;
}

void Slots::clear(int slot) {
    if (slots_[slot].layer >= 0) places_[slots_[slot].layer][slots_[slot].expert] = -1;
    slots_[slot] = {};
}

}  // namespace tenfold
