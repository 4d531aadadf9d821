// The experts of a model that need not fit in memory: some in slots, all in files, read as they are wanted.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "file.hpp"
#include "trial.hpp"

namespace tenfold {

struct StoredLayer {
    int number = 0;                   // among the layers of the model
    int file = 0;                     // among those of the store
    uint64_t offset = 0;              // of the first record; the others follow
    size_t record_bytes = 0;
    std::vector<uint32_t> checksums;  // CRC-32 of each expert's record
};

struct StoreMeter {
    uint64_t hits = 0, misses = 0;  // experts that a call wanted and that were in memory, or not yet
    uint64_t bytes_read = 0;
    double wait_seconds = 0;
    uint64_t prefetched = 0, prefetched_used = 0;
};

// A call has waited long: let Python hear of signals, and make it again. What it wants is still being read.
struct Stalled {};

// Every record is checked against its checksum before it is used. Readers of its own fill the slots, what a
// call wants first, what a prediction wants when there is nothing else to read.
class Store {
public:
    // Two slots or more; fewer than records. Throws ReadError, or std::bad_alloc.
    Store(const std::vector<std::string>& files, std::vector<StoredLayer> layers, size_t slots);
    ~Store();
    Store(const Store&) = delete;
    Store& operator=(const Store&) = delete;

    // The experts (ids, -1 for none) that the next layer seems to want. They are read once the layer that comes
    // before it has what it wants.
    void foresee(int layer, const std::vector<int32_t>& ids);
    StoreMeter meter();

    Trial look_ahead;

private:
    friend class Visit;
    class Readers;
    Readers& readers();
    static void forget_readers();  // in the child of a fork, which has none of the threads

    std::vector<std::unique_ptr<File>> files_;
    std::vector<StoredLayer> layers_;
    size_t slots_;
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
    size_t ready(size_t first);
    // Of one that is here.
    const uint8_t* record(size_t index) const;

private:
    Store::Readers& readers_;
    int layer_;
    std::vector<int32_t> experts_;
    size_t released_ = 0, ready_ = 0;
};

}  // namespace tenfold
