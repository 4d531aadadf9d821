#include "pool.hpp"

#include <algorithm>
#include <system_error>
#include <tuple>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#else
#define PAUSE() ((void)0)
#endif

namespace tenfold {

// About as long as the gap between two products of one token; then the thread sleeps.
constexpr int SPINS = 4000;

Pool::Pool(int threads) {
    try {
        for (int i = 1; i < threads; i++) workers_.emplace_back([this] { serve(); });
    } catch (const std::system_error&) {
        // As many as the system gives.
    }
}

Pool::~Pool() {
    stop_ = true;
    round_++;
    round_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void Pool::run(size_t items, size_t grain, const std::function<void(size_t, size_t)>& work) {
    stream(items, grain, [&work](size_t first, size_t last, size_t) { work(first, last); });
}

void Pool::stream(size_t items, size_t grain, const std::function<void(size_t, size_t, size_t)>& work) {
    if (workers_.empty() || items <= grain) {
        if (items) work(0, items, items);
        return;
    }
    work_ = &work;
    items_ = items;
    grain_ = grain;
    next_.store(0, std::memory_order_relaxed);
    open_ = true;
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
    take();
    open_ = false;
    for (int spins = 0; inside_;)
        if (spins++ < SPINS)
            PAUSE();
        else
            std::this_thread::yield(), spins = SPINS;  // there may be fewer cores than threads
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void Pool::take() noexcept {
    try {
        take_ranges();
    } catch (...) {
        next_.store(items_, std::memory_order_relaxed);  // what is left need not be begun
        std::lock_guard<std::mutex> alone(failing_);
        failure_ = std::current_exception();
    }
}

// Each range is claimed before work on the one before it begins.
void Pool::take_ranges() {
    auto [first, last] = claim();
    while (first < last) {
        const auto then = claim();
        (*work_)(first, last, then.first);
        std::tie(first, last) = then;
    }
}

// Half a fair share of what is left at a time: long stretches of memory first, and all end together.
std::pair<size_t, size_t> Pool::claim() {
    size_t first = next_.load(std::memory_order_relaxed);
    while (first < items_) {
        const size_t last = std::min(items_, first + std::max(grain_, (items_ - first) / (2 * size())));
        if (next_.compare_exchange_weak(first, last, std::memory_order_relaxed)) return {first, last};
    }
    return {items_, items_};
}

void Pool::serve() {
    uint32_t seen = 0;
    for (;;) {
        for (int i = 0; i < SPINS && round_.load(std::memory_order_acquire) == seen; i++) PAUSE();
        round_.wait(seen, std::memory_order_acquire);
        seen = round_.load(std::memory_order_acquire);
        if (stop_) return;
        inside_++;  // first, so that the round either stays or is seen to be over
        if (open_) take();
        inside_--;
    }
}

}  // namespace tenfold
