#include "pool.hpp"

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
    for (int i = 1; i < threads; i++) workers_.emplace_back([this] { serve(); });
}

Pool::~Pool() {
    stop_ = true;
    round_++;
    round_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void Pool::run(size_t items, size_t grain, const std::function<void(size_t, size_t)>& work) {
    if (workers_.empty() || items <= grain) {
        if (items) work(0, items);
        return;
    }
    work_ = &work;
    items_ = items;
    grain_ = grain;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
    take();
    while (busy_.load(std::memory_order_acquire)) PAUSE();
}

void Pool::take() {
    for (;;) {
        size_t first = next_.fetch_add(grain_, std::memory_order_relaxed);
        if (first >= items_) return;
        (*work_)(first, first + grain_ < items_ ? first + grain_ : items_);
    }
}

void Pool::serve() {
    uint32_t seen = 0;
    for (;;) {
        for (int i = 0; i < SPINS && round_.load(std::memory_order_acquire) == seen; i++) PAUSE();
        round_.wait(seen, std::memory_order_acquire);
        seen = round_.load(std::memory_order_acquire);
        if (stop_) return;
        take();
        busy_.fetch_sub(1, std::memory_order_release);
    }
}

}  // namespace tenfold
