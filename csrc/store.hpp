// The experts of a model that need not fit in memory: some in slots, all in files, read as they are wanted.
#pragma once

#include <deque>
#include <string>
#include <vector>

#include "readers.hpp"
#include "trial.hpp"

namespace tenfold {

// Every record is checked against its checksum before it is first used. A forked process finds no expert in memory.
class Store {
public:
    // At least two slots. Throws ReadError, or std::bad_alloc.
    Store(const std::vector<std::string>& files, std::vector<StoredLayer> layers, size_t slots);
    ~Store();
    Store(const Store&) = delete;
    Store& operator=(const Store&) = delete;

    // The experts that the next calls seem to want, the surest and nearest first. They are read while all that was
    // asked for is here or being read.
    void foresee(std::deque<Wanted> experts);
    // Not where all have room: the look costs as much, and finds nothing.
    bool looks_ahead() const { return slots_ < experts_ && look_ahead.on(); }
    StoreMeter meter();

    // No store changes in between. The child leaves its readers behind, for it has none of their threads.
    static void before_fork();
    static void after_fork(bool in_child);

    Trial look_ahead;  // of one call at a time (module.cpp)

private:
    friend class Visit;
    Readers& readers();

    Records records_;
    size_t slots_, experts_ = 0;
    Readers* readers_ = nullptr;
};

// One call of a layer: its experts in the order in which they can be had. One at a time (module.cpp).
class Visit {
public:
    Visit(Store& store, int layer, const int32_t* ids, int tokens, int top_k);
    ~Visit();
    Visit(const Visit&) = delete;
    Visit& operator=(const Visit&) = delete;

    const std::vector<int32_t>& experts() const { return experts_; }
    // Waits for expert number `first`, and says up to which one all are here. Those before `first` may go.
    // Throws ReadError for one that cannot be read or is damaged, and Stalled.
    size_t ready(Pool& pool, size_t first);
    // Of one that is here.
    const uint8_t* record(size_t index) const;

private:
    Readers& readers_;
    int layer_;
    std::vector<int32_t> experts_;
    size_t released_ = 0, ready_ = 0;
};

}  // namespace tenfold
