// Threads that bring records into slots: what the call under way wants first, what a prediction wants when there
// is nothing else to read.
#pragma once

#include <condition_variable>
#include <deque>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "file.hpp"
#include "pool.hpp"
#include "slots.hpp"

namespace tenfold {

constexpr size_t PIECE = size_t{1} << 20;  // of a record: it comes in as soon as the disk can bring it

struct StoredLayer {
    int number = 0;                   // among the layers of the model
    int file = 0;                     // among those of the store
    uint64_t offset = 0;              // of the first record; the others follow
    size_t record_bytes = 0;
    std::vector<uint32_t> checksums;  // CRC-32 of each expert's record
};

struct Records {
    std::vector<std::unique_ptr<File>> files;
    std::vector<StoredLayer> layers;
};

struct StoreMeter {
    uint64_t hits = 0, misses = 0;  // experts that a call wanted and that were in memory, or not yet
    uint64_t bytes_read = 0;
    double wait_seconds = 0;
    uint64_t prefetched = 0, prefetched_used = 0, prefetched_late = 0;  // the last are used, and misses
};

struct Wanted {
    int layer, expert;
};

// A call has waited long: let Python hear of signals, and make it again. What was on its way still comes.
struct Stalled {};

// With the slots, everything that a forked process must make anew. One call demands, awaits, releases and
// dismisses at a time.
class Readers {
public:
    // Throws ReadError, or std::bad_alloc.
    Readers(const Records& records, size_t slots);
    ~Readers();

    // What the next calls seem to want, instead of what seemed so before: read when all that is demanded is under way.
    void foresee(std::deque<Wanted> experts);
    StoreMeter meter();

    // The experts that tokens chose, those in memory first, then those on their way. They stay, once here.
    std::vector<int32_t> demand(int layer, const int32_t* ids, int tokens, int top_k);
    // Waits for expert number `first` of those, and says up to which one all are here. Throws ReadError, Stalled.
    size_t await(int layer, const std::vector<int32_t>& experts, size_t first);
    // Throws ReadError for the first of experts [first, end), all here, that is damaged. A bad one is read once more.
    void check(Pool& pool, int layer, const std::vector<int32_t>& experts, size_t first, size_t end);
    // Experts [first, end) may go.
    void release(int layer, const std::vector<int32_t>& experts, size_t first, size_t end);
    // So may all but the first `released`, which have gone, and no more need come.
    void dismiss(int layer, const std::vector<int32_t>& experts, size_t released, bool complete);
    // Where one is that is here.
    const uint8_t* record(int layer, int expert) const { return address(slots_.find(layer, expert)); }

private:
    struct Reading {
        Wanted wanted;
        int slot;
        bool demanded;  // by the call under way
        size_t size, taken = 0, left = size;
        std::string error = {};

        bool begun() const { return taken < size; }  // some of it is still to be taken
    };

    void serve();
    Reading* next();
    Reading* begin(std::deque<Wanted>& queue, bool demanded);
    void read(const Wanted& wanted, size_t at, size_t size, uint8_t* to) const;
    void finish(Reading& reading);
    void wake();

    std::string name(const Wanted& wanted) const;
    uint8_t* address(int slot) const { return arena_.get() + slot * stride_; }

    const Records& records_;
    const size_t stride_;
    const Arena arena_;
    std::mutex mutex_;  // it guards what follows
    std::condition_variable work_, arrived_;
    Slots slots_;
    std::deque<Wanted> demanded_, predicted_;
    std::list<Reading> readings_;
    int busy_ = 0;  // threads that read a piece
    std::string failure_;  // of what the call under way demanded
    double patience_ = 0;
    int stalled_ = -1;  // layer of the last call, if it was: what it wanted has been counted, and it comes again
    StoreMeter meter_;
    bool stop_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace tenfold
