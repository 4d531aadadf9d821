// Products of packed matrices with rows of activations, on all threads of a pool.
#pragma once

#include <vector>

#include "isa.hpp"
#include "pool.hpp"

namespace tenfold {

struct Matrix {
    const uint8_t* panels = nullptr;
    Format format = Format::bf16;
    int rows = 0, columns = 0;

    const uint8_t* panel(int index) const { return panels + index * panel_bytes(format, columns); }
    // One row as floats.
    void row(int index, float* out) const;
};

// Rows of activations rounded for a format, in tiles. A tile belongs to one group (one expert, say), and
// takes its rows in the order of `source`.
class Rounded {
public:
    // Tiles over rows [0, count).
    Rounded(Pool& pool, const Kernels& kernels, Format format, const float* x, int count, int columns);
    // Tiles over `source`, rows of x, within each of the groups that `first` (with an end) cuts it in.
    Rounded(Pool& pool, const Kernels& kernels, Format format, const float* x, int columns,
            const std::vector<int32_t>& source, const std::vector<int32_t>& first);

    int tiles() const { return static_cast<int>(starts_.size()) - 1; }
    int start(int tile) const { return starts_[tile]; }
    Tile tile(int index) const;
    // The tiles of group g are [group_first(g), group_first(g + 1)).
    int group_first(int group) const { return groups_[group]; }

private:
    void round(Pool& pool, const Kernels& kernels, const float* x, const int32_t* source);

    Format format_;
    int columns_, blocks_;
    std::vector<int32_t> groups_, starts_;  // in this order: the second is made while filling the first
    std::vector<int8_t> codes_;
    std::vector<float> scales_;
    std::vector<int32_t> corrections_;
    std::vector<uint16_t> bf16_;
};

constexpr size_t FAR = 24 << 10;  // bytes, more than memory delivers in the time of its own latency

// What to fetch while tile `index` of `count` meets the panel of an item, for a thread whose items end at
// `end`. With one tile that is what comes FAR later in its work; with several, the next item's panel, a part
// with each tile. `panel_at(item)` is a panel's address, `item_bytes` the bytes that one item reads.
template <class PanelAt>
Ahead ahead_of(const PanelAt& panel_at, size_t item, size_t end, size_t item_bytes, Format format, int blocks,
               int index, int count) {
    const int lines = static_cast<int>(code_bytes(format) / 64);
    if (count == 1 && item_bytes > 2 * FAR) return {panel_at(item) + FAR, lines};
    const size_t next = item + (count == 1 ? (FAR + item_bytes - 1) / item_bytes : 1);
    if (next >= end) return {};
    const int share = (lines + count - 1) / count;
    return {panel_at(next) + static_cast<size_t>(index) * blocks * share * 64, share};
}

struct Product {
    Matrix matrix;
    const float* bias;  // or null
    float* y;           // (tokens, rows)
};

// y = x W^T + bias for several matrices of one number of columns that share x (tokens, columns).
void linear(Pool& pool, const Kernels& kernels, const std::vector<Product>& products, const float* x, int tokens);

}  // namespace tenfold
