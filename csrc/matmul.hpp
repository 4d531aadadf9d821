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

// What to fetch while tile `index` of `count` meets a panel: with one tile, what comes some way behind the
// block at hand; with several, the panel that comes `stride` bytes on, a part with each tile.
Ahead ahead_of(const uint8_t* panel, Format format, int blocks, size_t stride, int index, int count);

struct Product {
    Matrix matrix;
    const float* bias;  // or null
    float* y;           // (tokens, rows)
};

// y = x W^T + bias for several matrices of one number of columns that share x (tokens, columns).
void linear(Pool& pool, const Kernels& kernels, const std::vector<Product>& products, const float* x, int tokens);

}  // namespace tenfold
