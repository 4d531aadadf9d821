#include "readers.hpp"

#include <signal.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <system_error>
#include <utility>

#include "crc32.hpp"

namespace tenfold {
namespace {

constexpr int READERS = 8;  // so that a disk which answers several at once has others to go on with
constexpr int GUESSING = 4;  // a guess is read where fewer than that read at all: what is demanded next waits for them
constexpr double PATIENCE = 0.25;  // seconds without an expert before a call is Stalled; twice that the next time

size_t largest(const std::vector<StoredLayer>& layers) {
    size_t bytes = 0;
    for (const StoredLayer& layer : layers) bytes = std::max(bytes, layer.record_bytes);
    return bytes;
}

std::vector<int> counts(const std::vector<StoredLayer>& layers) {
    std::vector<int> experts;
    for (const StoredLayer& layer : layers) experts.push_back(static_cast<int>(layer.checksums.size()));
    return experts;
}

std::string hex(uint32_t number) {
    char text[9];
    std::snprintf(text, sizeof text, "%08x", static_cast<unsigned>(number));
    return text;
}

}  // namespace

Readers::Readers(const Records& records, size_t slots)
    : records_(records), stride_(largest(records.layers)), arena_(slots * stride_),
      slots_(counts(records.layers), slots) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for Python's thread
    try {
        for (int i = 0; i < READERS; i++) threads_.emplace_back([this] { serve(); });
    } catch (const std::system_error&) {
        // As many as the system gives.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (threads_.empty()) throw ReadError("experts cannot be read: the system gives no thread to do it");
}

Readers::~Readers() {
    {
        std::lock_guard<std::mutex> alone(mutex_);
        stop_ = true;
    }
    work_.notify_all();
    for (auto& thread : threads_) thread.join();
}

void Readers::foresee(std::deque<Wanted> experts) {
    std::lock_guard<std::mutex> alone(mutex_);
    predicted_ = std::move(experts);
    wake();
}

StoreMeter Readers::meter() {
    std::lock_guard<std::mutex> alone(mutex_);
    return meter_;
}

std::vector<int32_t> Readers::demand(int layer, const int32_t* ids, int tokens, int top_k) {
    std::vector<int> uses(records_.layers[layer].checksums.size());
    for (int i = 0; i < tokens * top_k; i++)
        if (ids[i] >= 0) uses[ids[i]]++;
    std::vector<int32_t> here, coming, missing;
    std::lock_guard<std::mutex> alone(mutex_);
    for (int e = 0; e < static_cast<int>(uses.size()); e++) {
        if (!uses[e]) continue;
        const int slot = slots_.find(layer, e);
        (slot < 0 ? missing : slots_[slot].ready ? here : coming).push_back(e);
        if (slot < 0) continue;
        meter_.prefetched_used += slots_[slot].foreseen;
        meter_.prefetched_late += slots_[slot].foreseen && !slots_[slot].ready;
        slots_[slot].in_use = true;
    }
    if (std::exchange(stalled_, -1) != layer) {
        patience_ = PATIENCE;
        slots_.count(layer, uses, tokens);
        meter_.hits += here.size();
        meter_.misses += coming.size() + missing.size();
    }
    for (Reading& reading : readings_)
        reading.demanded |= reading.wanted.layer == layer && uses[reading.wanted.expert];
    for (int32_t e : missing) demanded_.push_back({layer, e});
    std::erase_if(predicted_, [&](const Wanted& wanted) { return wanted.layer == layer; });  // no longer a guess
    here.insert(here.end(), coming.begin(), coming.end());
    here.insert(here.end(), missing.begin(), missing.end());
    wake();
    return here;
}

size_t Readers::await(int layer, const std::vector<int32_t>& experts, size_t first) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto here = [&](size_t i) {
        const int slot = slots_.find(layer, experts[i]);
        return slot >= 0 && slots_[slot].ready;
    };
    if (!here(first)) {
        const auto start = std::chrono::steady_clock::now();
        const bool in_time = arrived_.wait_for(lock, std::chrono::duration<double>(patience_),
                                               [&] { return here(first) || !failure_.empty(); });
        meter_.wait_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        if (!failure_.empty()) throw ReadError(failure_);
        if (!in_time) {
            patience_ *= 2;  // a call that cannot hold all its experts begins anew, and must end some time
            stalled_ = layer;
            throw Stalled();
        }
    }
    size_t end = first + 1;
    while (end < experts.size() && here(end)) end++;
    return end;
}

// By all threads of who computes with it next, and not by a reader, which would leave the disk idle for that long.
void Readers::check(Pool& pool, int layer, const std::vector<int32_t>& experts, size_t first, size_t end) {
    const StoredLayer& stored = records_.layers[layer];
    for (size_t i = first; i < end; i++) {
        const Wanted wanted{layer, experts[i]};
        const int slot = slots_.find(layer, wanted.expert);
        if (slots_[slot].sound) continue;
        const uint32_t written = stored.checksums[wanted.expert];
        uint32_t there = crc32(pool, address(slot), stored.record_bytes);
        if (there != written) {  // perhaps it was read on a guess, long ago, and the file is whole again
            read(wanted, 0, stored.record_bytes, address(slot));
            there = crc32(pool, address(slot), stored.record_bytes);
        }
        std::lock_guard<std::mutex> alone(mutex_);
        slots_[slot].sound = there == written;
        if (slots_[slot].sound) continue;
        slots_.clear(slot);
        throw ReadError(records_.files[stored.file]->path() + ": " + name(wanted) +
                        " is damaged: its bytes have the CRC-32 " + hex(there) + ", not " + hex(written) +
                        "; pack the model again");
    }
}

void Readers::release(int layer, const std::vector<int32_t>& experts, size_t first, size_t end) {
    std::lock_guard<std::mutex> alone(mutex_);
    for (size_t i = first; i < end; i++) slots_[slots_.find(layer, experts[i])].in_use = false;
    wake();
}

void Readers::dismiss(int layer, const std::vector<int32_t>& experts, size_t released, bool complete) {
    std::lock_guard<std::mutex> alone(mutex_);
    demanded_.clear();
    if (!complete) predicted_.clear();  // else it would be read next, where what this call had and wants again lies
    failure_.clear();
    for (Reading& reading : readings_) reading.demanded = false;
    for (size_t i = released; i < experts.size(); i++) {
        const int slot = slots_.find(layer, experts[i]);
        if (slot >= 0 && slots_[slot].ready) slots_[slot].in_use = false;
    }
    wake();
}

void Readers::serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (Reading* reading = nullptr;;) {
        work_.wait(lock, [&] { return stop_ || (reading = next()); });
        if (stop_) return;
        const size_t at = reading->taken, size = std::min(PIECE, reading->size - at);
        reading->taken += size;
        busy_++;
        lock.unlock();
        std::string error;
        try {
            read(reading->wanted, at, size, address(reading->slot) + at);
        } catch (const ReadError& failure) {
            error = failure.what();
        }
        lock.lock();
        busy_--;
        meter_.bytes_read += error.empty() ? size : 0;
        reading->left -= size;
        if (!error.empty()) {
            reading->error = std::move(error);
            reading->left -= reading->size - std::exchange(reading->taken, reading->size);
        }
        if (reading->left == 0) finish(*reading);
    }
}

// What to read a piece of, now: what is predicted when all that is demanded is under way.
Readers::Reading* Readers::next() {
    for (Reading& reading : readings_)
        if (reading.demanded && reading.begun()) return &reading;
    if (Reading* reading = begin(demanded_, true)) return reading;
    if (busy_ >= GUESSING) return nullptr;
    const auto rest = std::find_if(readings_.begin(), readings_.end(), std::mem_fn(&Reading::begun));
    if (rest != readings_.end()) return &*rest;
    return demanded_.empty() ? begin(predicted_, false) : nullptr;
}

// Null where nothing is wanted, or no slot is free for it.
Readers::Reading* Readers::begin(std::deque<Wanted>& queue, bool demanded) {
    while (!queue.empty() && slots_.find(queue.front().layer, queue.front().expert) >= 0) queue.pop_front();
    if (queue.empty()) return nullptr;
    const Wanted wanted = queue.front();
    const int slot = slots_.place(wanted.layer, wanted.expert, !demanded);
    if (slot < 0) return nullptr;
    queue.pop_front();
    meter_.prefetched += !demanded;
    readings_.push_back({wanted, slot, demanded, records_.layers[wanted.layer].record_bytes});
    return &readings_.back();
}

void Readers::read(const Wanted& wanted, size_t at, size_t size, uint8_t* to) const {
    const StoredLayer& layer = records_.layers[wanted.layer];
    const uint64_t first = layer.offset + wanted.expert * static_cast<uint64_t>(layer.record_bytes);
    try {
        records_.files[layer.file]->read(first + at, size, to);
    } catch (const ReadError& error) {
        throw ReadError(error.what() + (" (" + name(wanted) + ")"));
    }
}

void Readers::finish(Reading& reading) {
    if (reading.error.empty()) {
        slots_[reading.slot].ready = true;
        slots_[reading.slot].in_use = reading.demanded;
    } else {
        slots_.clear(reading.slot);
        if (reading.demanded) failure_ = reading.error;
    }
    readings_.remove_if([&](const Reading& other) { return &other == &reading; });
    arrived_.notify_all();
    wake();
}

// As many as may find something to do: a thread that looks for nothing takes the time of one that computes.
void Readers::wake() {
    const auto pieces = [](size_t bytes) { return static_cast<int>((bytes + PIECE - 1) / PIECE); };
    int demanded = static_cast<int>(demanded_.size()) * pieces(stride_);
    int guessed = static_cast<int>(predicted_.size()) * pieces(stride_);
    for (const Reading& reading : readings_)
        (reading.demanded ? demanded : guessed) += pieces(reading.size - reading.taken);
    const int useful = std::max(std::min(demanded, READERS), std::min(demanded + guessed, GUESSING - busy_));
    for (int i = 0; i < useful; i++) work_.notify_one();
}

std::string Readers::name(const Wanted& wanted) const {
    return "layer " + std::to_string(records_.layers[wanted.layer].number) + ", expert " +
           std::to_string(wanted.expert);
}

}  // namespace tenfold
