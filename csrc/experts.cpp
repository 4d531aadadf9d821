#include "experts.hpp"

#include <algorithm>
#include <array>
#include <numeric>
#include <optional>
#include <utility>

namespace tenfold {
namespace {

// Some active experts and the slots that each of them fills.
struct Part {
    std::vector<int32_t> experts;
    std::vector<const uint8_t*> records;
    std::vector<int32_t> first;     // of each expert among the slots here, and the end
    std::vector<int32_t> token_of;  // of each slot here
};

// The filled slots (token * top_k + k) in a given order of experts, then of tokens.
class Routing {
public:
    Routing(const int32_t* ids, int tokens, int top_k, int experts, std::vector<int32_t> order)
        : order_(std::move(order)), first_(order_.size() + 1), place_of_(tokens * top_k, -1) {
        std::vector<int32_t> next(experts);
        for (int s = 0; s < tokens * top_k; s++)
            if (ids[s] >= 0) next[ids[s]]++;
        for (size_t g = 0; g < order_.size(); g++)
            first_[g + 1] = first_[g] + std::exchange(next[order_[g]], first_[g]);
        token_of_.resize(first_.back());
        for (int s = 0; s < tokens * top_k; s++)
            if (ids[s] >= 0) {
                place_of_[s] = next[ids[s]]++;
                token_of_[place_of_[s]] = s / top_k;
            }
    }

    size_t experts() const { return order_.size(); }
    size_t filled() const { return token_of_.size(); }
    size_t first(size_t group) const { return first_[group]; }
    // Of a slot among the filled ones, or -1.
    int32_t place_of(size_t slot) const { return place_of_[slot]; }

    // The experts [begin, end) in the order; `record_of(index)` is where one is.
    template <class RecordOf>
    Part part(size_t begin, size_t end, const RecordOf& record_of) const {
        Part part{{order_.begin() + begin, order_.begin() + end}, {}, {},
                  {token_of_.begin() + first_[begin], token_of_.begin() + first_[end]}};
        for (size_t g = begin; g < end; g++) part.records.push_back(record_of(g));
        for (size_t g = begin; g <= end; g++) part.first.push_back(first_[g] - first_[begin]);
        return part;
    }

private:
    std::vector<int32_t> order_, first_, token_of_, place_of_;
};

// Those that a token chose, in order.
std::vector<int32_t> active_experts(const int32_t* ids, int slots, int experts) {
    std::vector<bool> chosen(experts);
    for (int s = 0; s < slots; s++)
        if (ids[s] >= 0) chosen[ids[s]] = true;
    std::vector<int32_t> active;
    for (int e = 0; e < experts; e++)
        if (chosen[e]) active.push_back(e);
    return active;
}

// Floats whose memory the next call gets again: mapping some 50 MB anew for every layer of a prompt would take a
// tenth of its time.
class Buffer {
public:
    explicit Buffer(size_t count) {
        for (Aligned<float>& spare : spares())
            if (spare.size() >= count) {
                floats_.swap(spare);
                return;
            }
        floats_.resize(count);
    }
    ~Buffer() {
        for (Aligned<float>& spare : spares())
            if (spare.size() < floats_.size()) floats_.swap(spare);
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    float* get() { return floats_.data(); }

private:
    // The two largest so far, which is as many as a call uses; callers take turns (module.cpp).
    static std::array<Aligned<float>, 2>& spares() {
        static auto& kept = *new std::array<Aligned<float>, 2>;  // for ever: a thread may outlive main
        return kept;
    }
    Aligned<float> floats_;
};

class Call {
public:
    Call(Pool& pool, const Kernels& kernels, const Experts& layer, const Part& part)
        : pool_(pool), kernels_(kernels), layer_(layer), part_(part),
          dot_(kernels.dot[static_cast<int>(layer.format)]) {}

    // Gate and up of every slot, and their product: (slots, F).
    void hidden(const Rounded& rows, float* out) const {
        const int F = layer_.width, pairs = panels_of(F), blocks = blocks_of(layer_.hidden);
        const size_t bytes = panel_bytes(layer_.format, layer_.hidden);
        const Rounded tiles(pool_, rows, part_.token_of, part_.first);
        const auto gate_at = [&](size_t item) {
            return part_.records[item / pairs] + 2 * (item % pairs) * bytes;
        };
        const auto up_at = [&](size_t item) { return gate_at(item) + bytes; };
        each_panel(pairs, [&](size_t item, const Way& way) {
            alignas(64) float gate[MAX_TOKENS * ROWS], up[MAX_TOKENS * ROWS], product[MAX_TOKENS * ROWS];
            const int group = static_cast<int>(item / pairs), p = static_cast<int>(item % pairs);
            const int expert = part_.experts[group];
            const float* bias = layer_.gate_up_bias;
            if (bias) bias += static_cast<size_t>(expert) * 2 * F;
            const int row = p * ROWS, rows = std::min(ROWS, F - row);
            const int first = tiles.group_first(group), count = tiles.group_first(group + 1) - first;
            const AheadOf gate_ahead(gate_at, way, 2 * bytes, layer_.format, blocks, count),
                up_ahead(up_at, way, 2 * bytes, layer_.format, blocks, count);
            const uint8_t *gate_panel = gate_at(item), *up_panel = up_at(item);
            for (int i = first; i < first + count; i++) {
                const Tile tile = tiles.tile(i);
                dot_(gate_panel, blocks, tile, gate_ahead.with_tile(i - first), gate);
                dot_(up_panel, blocks, tile, up_ahead.with_tile(i - first), up);
                if (bias) {
                    add_bias(gate, tile.tokens, bias + row, rows);
                    add_bias(up, tile.tokens, bias + F + row, rows);
                }
                kernels_.swiglu(gate, up, tile.tokens * ROWS, layer_.clamped, product);
                put(product, tile.tokens, rows, out + static_cast<size_t>(tiles.start(i)) * F + row, F);
            }
        });
    }

    // Down of every slot, from `hidden`: (slots, D).
    void outputs(const float* hidden, float* out) const {
        const int F = layer_.width, D = layer_.hidden, blocks = blocks_of(F);
        const size_t skip = 2 * panels_of(F) * panel_bytes(layer_.format, D), bytes = panel_bytes(layer_.format, F);
        const Rounded tiles(pool_, kernels_, layer_.format, hidden, F, part_.first);
        const int panels = panels_of(D);
        const auto down_at = [&](size_t item) {
            return part_.records[item / panels] + skip + (item % panels) * bytes;
        };
        each_panel(panels, [&](size_t item, const Way& way) {
            alignas(64) float part[MAX_TOKENS * ROWS];
            const int group = static_cast<int>(item / panels), p = static_cast<int>(item % panels);
            const int expert = part_.experts[group];
            const int row = p * ROWS, rows = std::min(ROWS, D - row);
            const int first = tiles.group_first(group), count = tiles.group_first(group + 1) - first;
            const AheadOf ahead(down_at, way, bytes, layer_.format, blocks, count);
            const uint8_t* panel = down_at(item);
            for (int i = first; i < first + count; i++) {
                const Tile tile = tiles.tile(i);
                dot_(panel, blocks, tile, ahead.with_tile(i - first), part);
                if (layer_.down_bias)
                    add_bias(part, tile.tokens, layer_.down_bias + static_cast<size_t>(expert) * D + row, rows);
                put(part, tile.tokens, rows, out + static_cast<size_t>(tiles.start(i)) * D + row, D);
            }
        });
    }

private:
    // Runs work(item, way) for `panels` items of each expert, those of one before those of the next.
    template <class Work>
    void each_panel(int panels, const Work& work) const {
        const size_t items = part_.experts.size() * panels;
        pool_.stream(items, 1, [&](size_t begin, size_t end, size_t then) {
            for (size_t item = begin; item < end; item++) work(item, Way{item, end, then, items});
        });
    }

    Pool& pool_;
    const Kernels& kernels_;
    const Experts& layer_;
    const Part& part_;
    Dot dot_;
};

// The weighted sum of each token's slots, always in the same order.
void combine(Pool& pool, const Kernels& kernels, const Routing& routing, const float* outputs, const float* weights,
             int tokens, int top_k, int D, float* out) {
    pool.run(tokens, 1, [&](size_t begin, size_t end) {
        for (size_t t = begin; t < end; t++) {
            float* row = out + t * D;
            std::fill_n(row, D, 0.0f);
            for (size_t s = t * top_k; s < (t + 1) * top_k; s++)
                if (routing.place_of(s) >= 0)
                    kernels.add_scaled(outputs + static_cast<size_t>(routing.place_of(s)) * D, weights[s], D, row);
        }
    });
}

}  // namespace

void run_experts(Pool& pool, const Kernels& kernels, const Experts& layer, const float* x, int tokens,
                 const int32_t* ids, const float* weights, int top_k, float* out) {
    std::optional<Visit> visit;
    if (layer.store) visit.emplace(*layer.store, layer.layer, ids, tokens, top_k);
    const auto order = visit ? visit->experts() : active_experts(ids, tokens * top_k, layer.experts);
    const Routing routing(ids, tokens, top_k, layer.experts, order);
    const auto record_of = [&](size_t index) {
        return visit ? visit->record(index) : layer.records + order[index] * layer.record_bytes;
    };
    std::vector<int32_t> each(tokens + 1);
    std::iota(each.begin(), each.end(), 0);
    const Rounded rows(pool, kernels, layer.format, x, layer.hidden, each);
    Buffer hidden(routing.filled() * layer.width), outputs(routing.filled() * layer.hidden);
    for (size_t first = 0; first < routing.experts();) {
        const size_t end = visit ? visit->ready(pool, first) : routing.experts();
        const Part part = routing.part(first, end, record_of);
        const Call call(pool, kernels, layer, part);
        call.hidden(rows, hidden.get());
        call.outputs(hidden.get(), outputs.get() + routing.first(first) * layer.hidden);
        first = end;
    }
    combine(pool, kernels, routing, outputs.get(), weights, tokens, top_k, layer.hidden, out);
}

}  // namespace tenfold
