// Products of packed matrices with rows of activations, on all threads of a pool.
#pragma once

#include <algorithm>
#include <vector>

#include "aligned.hpp"
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

struct Linear {
    Matrix matrix;
    const float* bias = nullptr;
};

// Rows of activations rounded for a format, in tiles. A tile belongs to one group (one expert, say): group g has
// the rows [first[g], first[g + 1]).
class Rounded {
public:
    // The rows of x (…, columns) in their order.
    Rounded(Pool& pool, const Kernels& kernels, Format format, const float* x, int columns,
            const std::vector<int32_t>& first);
    // Row i is row source[i] of `rows`, in which each is a group of its own, and which must outlive this.
    Rounded(Pool& pool, const Rounded& rows, const std::vector<int32_t>& source, const std::vector<int32_t>& first);

    int tiles() const { return static_cast<int>(starts_.size()) - 1; }
    int start(int tile) const { return starts_[tile]; }
    Tile tile(int index) const;
    // The tiles of group g are [group_first(g), group_first(g + 1)).
    int group_first(int group) const { return groups_[group]; }

private:
    void make_room();
    int tokens(int tile) const { return starts_[tile + 1] - starts_[tile]; }

    Format format_;
    int blocks_;
    const Rounded* rows_ = nullptr;  // whose tile a row alone in its group has
    const int32_t* source_ = nullptr;
    std::vector<int32_t> groups_, starts_;  // in this order: the second is made while filling the first
    // For each row and block, in the order of Tile.
    Aligned<int8_t> codes_;
    Aligned<float> scales_;
    Aligned<int32_t> corrections_;
    Aligned<uint16_t> bf16_;
};

constexpr size_t FAR = 24 << 10;  // bytes, more than memory delivers in the time of its own latency

// The items of a thread: from `item`, at which it is, to `end`, then on from `then` (`items`: no more).
struct Way {
    size_t item, end, then, items;

    // The item `steps` after this one, or `items`.
    size_t after(size_t steps) const {
        const size_t next = item + steps;
        return next < end ? next : then == items ? items : std::min(items, then + (next - end));
    }
};

// What to fetch while the tiles of an item, `count` of them and at least one, meet its panel. With one tile that is the
// panel that comes FAR or more later on the thread's way; with several, the next item's, a part with each tile.
class AheadOf {
public:
    // `panel_at(item)` is a panel's address, `item_bytes` the bytes that one item reads.
    template <class PanelAt>
    AheadOf(const PanelAt& panel_at, const Way& way, size_t item_bytes, Format format, int blocks, int count) {
        const size_t next = way.after(count == 1 ? (FAR + item_bytes - 1) / item_bytes : 1);
        if (next >= way.items) return;
        share_ = (static_cast<int>(code_bytes(format) / 64) + count - 1) / count;
        bytes_ = static_cast<size_t>(blocks) * share_ * 64;
        panel_ = panel_at(next);
        scales_ = panel_ + blocks * code_bytes(format);
    }
    Ahead with_tile(int index) const {
        if (!panel_) return {};
        return {panel_ + index * bytes_, share_, index == 0 ? scales_ : nullptr};
    }

private:
    const uint8_t *panel_ = nullptr, *scales_ = nullptr;
    int share_ = 0;
    size_t bytes_ = 0;
};

// The first `rows` of each token's 16 results, to y (tokens, stride).
inline void put(const float* results, int tokens, int rows, float* y, size_t stride) {
    for (int t = 0; t < tokens; t++) std::copy_n(results + t * ROWS, rows, y + t * stride);
}

// results (tokens, 16) += bias (rows)
inline void add_bias(float* results, int tokens, const float* bias, int rows) {
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) results[t * ROWS + r] += bias[r];
}

struct Product {
    Matrix matrix;
    const float* bias;  // or null
    float* y;           // (tokens, rows)
};

// y = x W^T + bias for several matrices of one number of columns that share x (tokens, columns).
void linear(Pool& pool, const Kernels& kernels, const std::vector<Product>& products, const float* x, int tokens);

// y = W x for each head of each token, which has a matrix in bf16 of its own: `first` is the first head's, the others'
// follow. A head's numbers are the first of its `x_stride` in x (tokens, heads, x_stride), and of `y_stride` in y.
void linear_by_head(Pool& pool, const Kernels& kernels, const Matrix& first, int heads, const float* x, size_t x_stride,
                    float* y, size_t y_stride, int tokens);

}  // namespace tenfold
