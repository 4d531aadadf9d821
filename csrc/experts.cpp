#include "experts.hpp"

#include <algorithm>
#include <array>
#include <memory>
#include <numeric>
#include <utility>

namespace tenfold {
namespace {

// The filled slots (token * top_k + k) in order of expert, then token.
struct Routing {
    std::vector<int32_t> active;    // experts with a token
    std::vector<int32_t> first;     // of each active expert among the filled slots, and the end
    std::vector<int32_t> token_of;  // of each filled slot
    std::vector<int32_t> place_of;  // of each slot among the filled ones, or -1

    Routing(const int32_t* ids, int tokens, int top_k, int experts) : place_of(tokens * top_k, -1) {
        std::vector<int32_t> next(experts + 1);
        for (int s = 0; s < tokens * top_k; s++)
            if (ids[s] >= 0) next[ids[s] + 1]++;
        for (int e = 0; e < experts; e++)
            if (next[e + 1]) active.push_back(e);
        std::partial_sum(next.begin(), next.end(), next.begin());
        for (int e : active) first.push_back(next[e]);
        first.push_back(next.back());
        token_of.resize(next.back());
        for (int s = 0; s < tokens * top_k; s++)
            if (ids[s] >= 0) {
                place_of[s] = next[ids[s]]++;
                token_of[place_of[s]] = s / top_k;
            }
    }
};

// Floats that are not initialised, and whose memory the next call gets again: mapping some 50 MB anew for
// every layer of a prompt would take a tenth of its time.
class Buffer {
public:
    explicit Buffer(size_t count) {
        for (Memory& spare : spares())
            if (spare.size >= count) {
                std::swap(memory_, spare);
                return;
            }
        memory_ = {std::unique_ptr<float[]>(new float[count]), count};
    }
    ~Buffer() {
        for (Memory& spare : spares())
            if (spare.size < memory_.size) std::swap(memory_, spare);
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    float* get() const { return memory_.floats.get(); }
    float& operator[](size_t i) const { return memory_.floats[i]; }

private:
    struct Memory {
        std::unique_ptr<float[]> floats;
        size_t size = 0;
    };
    // The two largest so far, which is as many as a call uses; callers take turns (module.cpp).
    static std::array<Memory, 2>& spares() {
        static std::array<Memory, 2> kept;
        return kept;
    }
    Memory memory_;
};

class Call {
public:
    Call(Pool& pool, const Kernels& kernels, const Experts& layer, const Routing& routing)
        : pool_(pool), kernels_(kernels), layer_(layer), routing_(routing),
          dot_(kernels.dot[static_cast<int>(layer.format)]) {}

    // Gate and up of every filled slot, and their product: (filled, F).
    void hidden(const float* x, float* out) const {
        const int F = layer_.width, pairs = panels_of(F), blocks = blocks_of(layer_.hidden);
        const size_t bytes = panel_bytes(layer_.format, layer_.hidden);
        const Rounded tiles(pool_, kernels_, layer_.format, x, layer_.hidden, routing_.token_of, routing_.first);
        const auto gate_at = [&](size_t item) {
            return layer_.record(routing_.active[item / pairs]) + 2 * (item % pairs) * bytes;
        };
        const auto up_at = [&](size_t item) { return gate_at(item) + bytes; };
        each_panel(pairs, [&](size_t item, const Way& way) {
            alignas(64) float gate[MAX_TOKENS * ROWS], up[MAX_TOKENS * ROWS], product[MAX_TOKENS * ROWS];
            const int group = static_cast<int>(item / pairs), p = static_cast<int>(item % pairs);
            const int expert = routing_.active[group];
            const float* bias = layer_.gate_up_bias;
            if (bias) bias += static_cast<size_t>(expert) * 2 * F;
            const int row = p * ROWS, rows = std::min(ROWS, F - row);
            const int first = tiles.group_first(group), count = tiles.group_first(group + 1) - first;
            for (int i = first; i < first + count; i++) {
                const Tile tile = tiles.tile(i);
                const auto ahead = [&](const auto& panel_at) {
                    return ahead_of(panel_at, way, 2 * bytes, layer_.format, blocks, i - first, count);
                };
                dot_(gate_at(item), blocks, tile, ahead(gate_at), gate);
                dot_(up_at(item), blocks, tile, ahead(up_at), up);
                if (bias) {
                    add_bias(gate, tile.tokens, bias + row, rows);
                    add_bias(up, tile.tokens, bias + F + row, rows);
                }
                kernels_.swiglu(gate, up, tile.tokens * ROWS, layer_.clamped, product);
                for (int t = 0; t < tile.tokens; t++)
                    std::copy_n(product + t * ROWS, rows, &out[static_cast<size_t>(tiles.start(i) + t) * F + row]);
            }
        });
    }

    // Down of every filled slot, from `hidden`: (filled, D).
    void outputs(const float* hidden, float* out) const {
        const int F = layer_.width, D = layer_.hidden, blocks = blocks_of(F);
        const size_t skip = 2 * panels_of(F) * panel_bytes(layer_.format, D), bytes = panel_bytes(layer_.format, F);
        std::vector<int32_t> all(routing_.token_of.size());
        std::iota(all.begin(), all.end(), 0);
        const Rounded tiles(pool_, kernels_, layer_.format, hidden, F, all, routing_.first);
        const int panels = panels_of(D);
        const auto down_at = [&](size_t item) {
            return layer_.record(routing_.active[item / panels]) + skip + (item % panels) * bytes;
        };
        each_panel(panels, [&](size_t item, const Way& way) {
            alignas(64) float part[MAX_TOKENS * ROWS];
            const int group = static_cast<int>(item / panels), p = static_cast<int>(item % panels);
            const int expert = routing_.active[group];
            const int row = p * ROWS, rows = std::min(ROWS, D - row);
            const int first = tiles.group_first(group), count = tiles.group_first(group + 1) - first;
            for (int i = first; i < first + count; i++) {
                const Tile tile = tiles.tile(i);
                const Ahead ahead =
                    ahead_of(down_at, way, bytes, layer_.format, blocks, i - first, count);
                dot_(down_at(item), blocks, tile, ahead, part);
                if (layer_.down_bias)
                    add_bias(part, tile.tokens, layer_.down_bias + static_cast<size_t>(expert) * D + row, rows);
                for (int t = 0; t < tile.tokens; t++)
                    std::copy_n(part + t * ROWS, rows, &out[static_cast<size_t>(tiles.start(i) + t) * D + row]);
            }
        });
    }

    void combine(const float* outputs, const float* weights, int tokens, int top_k, float* out) const {
        const int D = layer_.hidden;
        pool_.run(tokens, 1, [&](size_t begin, size_t end) {
            for (size_t t = begin; t < end; t++) {
                float* row = out + t * D;
                std::fill_n(row, D, 0.0f);
                for (size_t s = t * top_k; s < (t + 1) * top_k; s++)
                    if (routing_.place_of[s] >= 0)
                        kernels_.add_scaled(outputs + static_cast<size_t>(routing_.place_of[s]) * D, weights[s], D, row);
            }
        });
    }

private:
    // Runs work(item, way) for `panels` items of each active expert, those of one before those of the next.
    template <class Work>
    void each_panel(int panels, const Work& work) const {
        const size_t items = routing_.active.size() * panels;
        pool_.stream(items, 1, [&](size_t begin, size_t end, size_t then) {
            for (size_t item = begin; item < end; item++) work(item, Way{item, end, then, items});
        });
    }

    static void add_bias(float* values, int tokens, const float* bias, int rows) {
        for (int t = 0; t < tokens; t++)
            for (int r = 0; r < rows; r++) values[t * ROWS + r] += bias[r];
    }

    Pool& pool_;
    const Kernels& kernels_;
    const Experts& layer_;
    const Routing& routing_;
    Dot dot_;
};

}  // namespace

void run_experts(Pool& pool, const Kernels& kernels, const Experts& layer, const float* x, int tokens,
                 const int32_t* ids, const float* weights, int top_k, float* out) {
    const Routing routing(ids, tokens, top_k, layer.experts);
    const Call call(pool, kernels, layer, routing);
    const Buffer hidden(routing.token_of.size() * layer.width), outputs(routing.token_of.size() * layer.hidden);
    call.hidden(x, hidden.get());
    call.outputs(hidden.get(), outputs.get());
    call.combine(outputs.get(), weights, tokens, top_k, out);
}

}  // namespace tenfold
