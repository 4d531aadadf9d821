// Which expert lies in which slot of a store, and which must go when another comes. Nothing is read here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tenfold {

struct Slot {
    int layer = -1, expert = -1;  // -1: empty
    bool ready = false;           // else being read
    bool sound = false;           // its checksum has been seen to be right
    bool in_use = false;          // by who reads it or computes with it: it must stay
    bool foreseen = false;        // read because it was predicted, and its layer has not come yet
};

// Memory of its own for a number of records, in huge pages where the system has them. A fork does not have it:
// it would be as much again, and the system may be writing to it just then.
class Arena {
public:
    // Throws std::bad_alloc.
    explicit Arena(size_t bytes);
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    uint8_t* get() const { return first_; }

private:
    void* mapped_;
    size_t bytes_;
    uint8_t* first_;
};

class Slots {
public:
    Slots(const std::vector<int>& experts, size_t count);  // experts of each layer

    Slot& operator[](int slot) { return slots_[slot]; }
    // The slot of an expert, or -1.
    int find(int layer, int expert) const { return places_[layer][expert]; }

    // A layer has been asked for its experts: `uses` tokens of `tokens` chose each.
    void count(int layer, const std::vector<int>& uses, int tokens);
    // Gives the expert an empty slot, or that of the one which will be wanted last; -1 if all are in use, or will be
    // wanted before one that is only foreseen.
    int place(int layer, int expert, bool foreseen);
    void clear(int slot);

private:
    struct Frequency {
        std::vector<double> uses;  // of each expert, by recent tokens
        double tokens = 0;
    };
    double turn(int layer) const;
    double next_use(const Slot& slot) const;

    std::vector<Slot> slots_;
    std::vector<std::vector<int>> places_;
    std::vector<Frequency> frequencies_;
    int layer_ = 0;  // asked last
    double sure_ = 1;  // the share of what was foreseen lately that came true
};

}  // namespace tenfold
