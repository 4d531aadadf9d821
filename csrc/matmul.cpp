#include "matmul.hpp"

#include <algorithm>
#include <cstring>

namespace tenfold {

namespace {

std::vector<int32_t> tile_starts(const std::vector<int32_t>& first, std::vector<int32_t>& groups) {
    std::vector<int32_t> starts;
    for (size_t g = 0; g + 1 < first.size(); g++) {
        groups.push_back(static_cast<int32_t>(starts.size()));
        for (int32_t t = first[g]; t < first[g + 1]; t += MAX_TOKENS) starts.push_back(t);
    }
    groups.push_back(static_cast<int32_t>(starts.size()));
    starts.push_back(first.back());
    return starts;
}

}  // namespace

Rounded::Rounded(Pool& pool, const Kernels& kernels, Format format, const float* x, int count, int columns)
    : format_(format), columns_(columns), blocks_(blocks_of(columns)), starts_(tile_starts({0, count}, groups_)) {
    round(pool, kernels, x, nullptr);
}

Rounded::Rounded(Pool& pool, const Kernels& kernels, Format format, const float* x, int columns,
                 const std::vector<int32_t>& source, const std::vector<int32_t>& first)
    : format_(format), columns_(columns), blocks_(blocks_of(columns)), starts_(tile_starts(first, groups_)) {
    round(pool, kernels, x, source.data());
}

void Rounded::round(Pool& pool, const Kernels& kernels, const float* x, const int32_t* source) {
    const size_t count = starts_.back(), padded = count * blocks_ * BLOCK;
    if (format_ == Format::bf16) {
        bf16_.resize(padded);
    } else {
        codes_.resize(padded);
        scales_.resize(count * blocks_);
        corrections_.resize(count * blocks_);
    }
    pool.run(tiles(), 1, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; i++) {
            const int first = starts_[i], T = starts_[i + 1] - first;
            const size_t at = static_cast<size_t>(first) * blocks_;
            for (int t = 0; t < T; t++) {
                const float* row = x + static_cast<size_t>(source ? source[first + t] : first + t) * columns_;
                for (int b = 0; b < blocks_; b++) {
                    alignas(64) float edge[BLOCK];
                    const float* values = row + b * BLOCK;
                    const int left = columns_ - b * BLOCK;
                    if (left < BLOCK) {
                        std::fill(std::copy_n(values, left, edge), edge + BLOCK, 0.0f);
                        values = edge;
                    }
                    const size_t block = at + static_cast<size_t>(b) * T + t;
                    if (format_ == Format::bf16)
                        kernels.round_bf16(values, BLOCK, bf16_.data() + block * BLOCK);
                    else
                        scales_[block] =
                            kernels.round_block(values, codes_.data() + block * BLOCK, &corrections_[block]);
                }
            }
        }
    });
}

Tile Rounded::tile(int index) const {
    const size_t block = static_cast<size_t>(starts_[index]) * blocks_;
    const int tokens = starts_[index + 1] - starts_[index];
    if (format_ == Format::bf16) return {nullptr, nullptr, nullptr, bf16_.data() + block * BLOCK, tokens};
    return {codes_.data() + block * BLOCK, scales_.data() + block, corrections_.data() + block, nullptr, tokens};
}

void Matrix::row(int index, float* out) const {
    const uint8_t* panel = this->panel(index / ROWS);
    const int row = index % ROWS, blocks = blocks_of(columns);
    if (format == Format::bf16) {
        const uint16_t* halves = reinterpret_cast<const uint16_t*>(panel);
        for (int k = 0; k < columns; k++) out[k] = bf16_to_float(halves[bf16_place(row, k)]);
        return;
    }
    const uint8_t* scales = panel + blocks * code_bytes(format);
    float row_scale = 1;
    if (row_scale_bytes(format)) std::memcpy(&row_scale, scales + blocks * ROWS + row * 4, 4);
    for (int b = 0; b < blocks; b++) {
        const uint8_t* block = panel + b * code_bytes(format);
        const float scale = format == Format::mxfp4 ? mxfp4_scale(scales[b * ROWS + row])
                                                    : block_scale(scales[b * ROWS + row]) * row_scale;
        for (int k = 0; k < BLOCK && b * BLOCK + k < columns; k++)
            out[b * BLOCK + k] = scale * static_cast<float>(code_value(format, block, row, k));
    }
}

void linear(Pool& pool, const Kernels& kernels, const std::vector<Product>& products, const float* x, int tokens) {
    if (tokens == 0) return;
    std::vector<Rounded> rounded;  // one for bf16, one for the rest: formats that are there
    int of_format[2] = {-1, -1};
    std::vector<size_t> first{0};
    for (const Product& p : products) {
        int& index = of_format[p.matrix.format == Format::bf16];
        if (index < 0) {
            index = static_cast<int>(rounded.size());
            rounded.emplace_back(pool, kernels, p.matrix.format, x, tokens, p.matrix.columns);
        }
        first.push_back(first.back() + panels_of(p.matrix.rows));
    }
    pool.stream(first.back(), 1, [&](size_t begin, size_t end, size_t then) {
        alignas(64) float out[MAX_TOKENS * ROWS];
        const auto product_of = [&](size_t item) {
            return static_cast<size_t>(std::upper_bound(first.begin(), first.end(), item) - first.begin()) - 1;
        };
        const auto panel_at = [&](size_t item) {
            const size_t which = product_of(item);
            return products[which].matrix.panel(static_cast<int>(item - first[which]));
        };
        for (size_t item = begin; item < end; item++) {
            const auto& [matrix, bias, y] = products[product_of(item)];
            const Rounded& tiles = rounded[of_format[matrix.format == Format::bf16]];
            const int blocks = blocks_of(matrix.columns);
            const size_t bytes = panel_bytes(matrix.format, matrix.columns);
            const int row = static_cast<int>(item - first[product_of(item)]) * ROWS;
            const int rows = std::min(ROWS, matrix.rows - row);
            for (int i = 0; i < tiles.tiles(); i++) {
                const Tile tile = tiles.tile(i);
                const Ahead ahead = ahead_of(panel_at, {item, end, then, first.back()}, bytes, matrix.format, blocks, i, tiles.tiles());
                kernels.dot[static_cast<int>(matrix.format)](panel_at(item), blocks, tile, ahead, out);
                for (int t = 0; t < tile.tokens; t++) {
                    float* to = y + static_cast<size_t>(tiles.start(i) + t) * matrix.rows + row;
                    for (int r = 0; r < rows; r++) to[r] = out[t * ROWS + r] + (bias ? bias[row + r] : 0);
                }
            }
        }
    });
}

}  // namespace tenfold
