#include "matmul.hpp"

#include <algorithm>
#include <cstring>

namespace tenfold {

namespace {

// Tiles of a group as equal as can be: in one of few rows, products wait for each other.
std::vector<int32_t> tile_starts(const std::vector<int32_t>& first, std::vector<int32_t>& groups) {
    std::vector<int32_t> starts;
    for (size_t g = 0; g + 1 < first.size(); g++) {
        groups.push_back(static_cast<int32_t>(starts.size()));
        const int64_t rows = first[g + 1] - first[g], tiles = (rows + MAX_TOKENS - 1) / MAX_TOKENS;
        for (int64_t i = 0; i < tiles; i++) starts.push_back(static_cast<int32_t>(first[g] + rows * i / tiles));
    }
    groups.push_back(static_cast<int32_t>(starts.size()));
    starts.push_back(first.back());
    return starts;
}

}  // namespace

Rounded::Rounded(Pool& pool, const Kernels& kernels, Format format, const float* x, int columns,
                 const std::vector<int32_t>& first)
    : format_(format), blocks_(blocks_of(columns)), starts_(tile_starts(first, groups_)) {
    make_room();
    pool.run(tiles(), 1, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; i++) {
            for (int t = 0; t < tokens(i); t++) {
                const float* row = x + static_cast<size_t>(starts_[i] + t) * columns;
                for (int b = 0; b < blocks_; b++) {
                    alignas(64) float edge[BLOCK];
                    const float* values = row + b * BLOCK;
                    const int left = columns - b * BLOCK;
                    if (left < BLOCK) {
                        std::fill(std::copy_n(values, left, edge), edge + BLOCK, 0.0f);
                        values = edge;
                    }
                    const size_t block = static_cast<size_t>(starts_[i]) * blocks_ + b * tokens(i) + t;
                    if (format_ == Format::bf16)
                        kernels.round_bf16(values, BLOCK, &bf16_[block * BLOCK]);
                    else
                        scales_[block] = kernels.round_block(values, &codes_[block * BLOCK], &corrections_[block]);
                }
            }
        }
    });
}

Rounded::Rounded(Pool& pool, const Rounded& rows, const std::vector<int32_t>& source, const std::vector<int32_t>& first)
    : format_(rows.format_), blocks_(rows.blocks_), rows_(&rows), source_(source.data()),
      starts_(tile_starts(first, groups_)) {
    if (tiles() == starts_.back()) return;  // each row is alone
    make_room();
    pool.run(tiles(), 1, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; i++) {
            if (tokens(i) == 1) continue;
            for (int t = 0; t < tokens(i); t++) {
                const size_t row = static_cast<size_t>(source[starts_[i] + t]) * blocks_;
                for (int b = 0; b < blocks_; b++) {
                    const size_t from = row + b, to = static_cast<size_t>(starts_[i]) * blocks_ + b * tokens(i) + t;
                    if (format_ == Format::bf16) {
                        std::copy_n(&rows.bf16_[from * BLOCK], BLOCK, &bf16_[to * BLOCK]);
                        continue;
                    }
                    std::copy_n(&rows.codes_[from * BLOCK], BLOCK, &codes_[to * BLOCK]);
                    scales_[to] = rows.scales_[from];
                    corrections_[to] = rows.corrections_[from];
                }
            }
        }
    });
}

// Every part of it that is read is written.
void Rounded::make_room() {
    const size_t count = static_cast<size_t>(starts_.back()) * blocks_;
    if (format_ == Format::bf16) return bf16_.resize(count * BLOCK);
    codes_.resize(count * BLOCK);
    scales_.resize(count);
    corrections_.resize(count);
}

Tile Rounded::tile(int index) const {
    if (rows_ && tokens(index) == 1) return rows_->tile(source_[starts_[index]]);
    const size_t block = static_cast<size_t>(starts_[index]) * blocks_;
    if (format_ == Format::bf16) return {nullptr, nullptr, nullptr, &bf16_[block * BLOCK], tokens(index)};
    return {&codes_[block * BLOCK], &scales_[block], &corrections_[block], nullptr, tokens(index)};
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
            rounded.emplace_back(pool, kernels, p.matrix.format, x, p.matrix.columns, std::vector{0, tokens});
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
            const uint8_t* panel = panel_at(item);
            const AheadOf ahead(panel_at, {item, end, then, first.back()}, bytes, matrix.format, blocks, tiles.tiles());
            const Dot dot = kernels.dot[static_cast<int>(matrix.format)];
            for (int i = 0; i < tiles.tiles(); i++) {
                const Tile tile = tiles.tile(i);
                dot(panel, blocks, tile, ahead.with_tile(i), out);
                if (bias) add_bias(out, tile.tokens, bias + row, rows);
                put(out, tile.tokens, rows, y + static_cast<size_t>(tiles.start(i)) * matrix.rows + row, matrix.rows);
            }
        }
    });
}

void linear_by_head(Pool& pool, const Kernels& kernels, const Matrix& first, int heads, const float* x, size_t x_stride,
                    float* y, size_t y_stride, int tokens) {
    const int tiles = (tokens + MAX_TOKENS - 1) / MAX_TOKENS, blocks = blocks_of(first.columns);
    const Dot dot = kernels.dot[static_cast<int>(Format::bf16)];
    pool.run(static_cast<size_t>(heads) * tiles, 1, [&](size_t begin, size_t end) {
        Aligned<uint16_t> rounded(static_cast<size_t>(MAX_TOKENS) * blocks * BLOCK);
        alignas(64) float out[MAX_TOKENS * ROWS];
        for (size_t item = begin; item < end; item++) {
            const size_t head = item / tiles, from = item % tiles * MAX_TOKENS;
            const int count = std::min<int>(MAX_TOKENS, tokens - static_cast<int>(from));
            std::fill_n(rounded.begin(), static_cast<size_t>(count) * blocks * BLOCK, uint16_t{0});
            for (int t = 0; t < count; t++) {
                const float* row = x + ((from + t) * heads + head) * x_stride;
                for (int b = 0; b < blocks; b++)
                    kernels.round_bf16(row + b * BLOCK, std::min(BLOCK, first.columns - b * BLOCK),
                                       &rounded[(static_cast<size_t>(b) * count + t) * BLOCK]);
            }
            const Tile tile{nullptr, nullptr, nullptr, rounded.data(), count};
            const int panels = panels_of(first.rows);
            for (int p = 0; p < panels; p++) {
                const uint8_t* panel = first.panel(static_cast<int>(head) * panels + p);
                const uint8_t* next = panel + panel_bytes(Format::bf16, first.columns);
                dot(panel, blocks, tile, {next, static_cast<int>(code_bytes(Format::bf16) / 64), nullptr}, out);
                float* to = y + (from * heads + head) * y_stride + static_cast<size_t>(p) * ROWS;
                put(out, count, std::min(ROWS, first.rows - p * ROWS), to, heads * y_stride);
            }
        }
    });
}

}  // namespace tenfold
