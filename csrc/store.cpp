#include "store.hpp"

#include <algorithm>
#include <mutex>
#include <utility>

namespace tenfold {
namespace {

std::mutex one_registrar;  // it guards what follows, and which readers each store has
std::vector<Store*>& stores = *new std::vector<Store*>;

}  // namespace

Store::Store(const std::vector<std::string>& files, std::vector<StoredLayer> layers, size_t slots)
    : records_{{}, std::move(layers)}, slots_(slots) {
    for (const StoredLayer& layer : records_.layers) experts_ += layer.checksums.size();
    for (const std::string& path : files) records_.files.push_back(std::make_unique<File>(path));
    readers();
    std::lock_guard<std::mutex> alone(one_registrar);
    stores.push_back(this);
}

Store::~Store() {
    {
        std::lock_guard<std::mutex> alone(one_registrar);
        stores.erase(std::find(stores.begin(), stores.end(), this));
    }
    delete readers_;
}

void Store::before_fork() { one_registrar.lock(); }

void Store::after_fork(bool in_child) {
    if (in_child)
        for (Store* store : stores) store->readers_ = nullptr;
    one_registrar.unlock();
}

Readers& Store::readers() {
    std::lock_guard<std::mutex> alone(one_registrar);
    if (!readers_) readers_ = new Readers(records_, slots_);
    return *readers_;
}

void Store::foresee(std::deque<Wanted> experts) { readers().foresee(std::move(experts)); }

StoreMeter Store::meter() { return readers().meter(); }

Visit::Visit(Store& store, int layer, const int32_t* ids, int tokens, int top_k)
    : readers_(store.readers()), layer_(layer), experts_(readers_.demand(layer, ids, tokens, top_k)) {}

Visit::~Visit() { readers_.dismiss(layer_, experts_, released_, ready_ == experts_.size()); }

size_t Visit::ready(Pool& pool, size_t first) {
    readers_.release(layer_, experts_, released_, first);
    released_ = first;
    const size_t end = readers_.await(layer_, experts_, first);
    readers_.check(pool, layer_, experts_, first, end);
    return ready_ = end;
}

const uint8_t* Visit::record(size_t index) const { return readers_.record(layer_, experts_[index]); }

}  // namespace tenfold
