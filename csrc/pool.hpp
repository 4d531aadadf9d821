// A few threads that wait for work by spinning a little, then sleep.
#pragma once

#include <atomic>
#include <cstddef>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace tenfold {

class Pool {
public:
    // The caller and `threads` - 1 others, or as many of those as the system gives.
    explicit Pool(int threads);
    ~Pool();
    int size() const { return static_cast<int>(workers_.size()) + 1; }

    // Calls work(first, last) for ranges that cover [0, items), of at least `grain`, on all threads. Throws what
    // one of the calls threw, when none is under way any more.
    void run(size_t items, size_t grain, const std::function<void(size_t, size_t)>& work);

    // The same with work(first, last, then): `then` is where the thread goes on afterwards (`items`: nowhere), so
    // that it can fetch what is there in time.
    void stream(size_t items, size_t grain, const std::function<void(size_t, size_t, size_t)>& work);

private:
    void serve();
    void take() noexcept;
    void take_ranges();
    // The next items that nobody has, {items, items} at the end.
    std::pair<size_t, size_t> claim();

    std::vector<std::thread> workers_;
    const std::function<void(size_t, size_t, size_t)>* work_ = nullptr;
    size_t items_ = 0, grain_ = 1;
    alignas(64) std::atomic<size_t> next_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
    // A round is over when all is done, and none is inside: one who wakes too late for it need not be waited for.
    alignas(64) std::atomic<int> inside_{0};
    std::atomic<bool> open_{false};
    std::atomic<bool> stop_{false};
    std::mutex failing_;
    std::exception_ptr failure_;
};

}  // namespace tenfold
