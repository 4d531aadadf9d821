#include "attention.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "aligned.hpp"
#include "matmul.hpp"

namespace tenfold {

void Cache::write(const Kernels& kernels, int block, int head, int offset, const float* key, const float* value,
                  int head_dim) const {
    uint16_t* k = keys_of(block, head) + static_cast<size_t>(offset / ROWS) * ROWS * width + bf16_place(offset % ROWS, 0);
    uint16_t* v = values_of(block, head) + bf16_place(0, offset);
    for (int first = 0; first < head_dim; first += BLOCK) {
        alignas(64) uint16_t rounded[BLOCK] = {};
        const int count = std::min(BLOCK, head_dim - first);
        kernels.round_bf16(key + first, count, rounded);
        for (int d = 0; d < BLOCK; d += 2)  // neighbours of a row lie together
            std::memcpy(k + bf16_place(0, first + d), rounded + d, 2 * sizeof *rounded);
        kernels.round_bf16(value + first, count, rounded);
        for (int d = 0; d < count; d++)
            v[static_cast<size_t>((first + d) / ROWS) * ROWS * block_size + bf16_place((first + d) % ROWS, 0)] = rounded[d];
    }
}

namespace {

// A few neighbouring tokens of one sequence.
struct Run {
    int first, count;
};

// As many tokens together as give a full tile with the query heads that share a key head.
std::vector<Run> cut(const Places& places, int most) {
    std::vector<Run> runs;
    for (int t = 0; t < places.tokens; t++) {
        const bool follows = t && places.sequences[t] == places.sequences[t - 1];
        if (follows && runs.back().count < most)
            runs.back().count++;
        else
            runs.push_back({t, 1});
    }
    return runs;
}

constexpr int FEW = 8;

// Positions [begin, end) of a sequence, which lie in one block of its cache, from `offset` on.
struct Stretch {
    int block, offset, begin, end;
};

// One tile of at most 16 queries that share a key head, with the memory it works in.
class Scorer {
public:
    Scorer(const Kernels& kernels, const Heads& heads, const Cache& cache, const Places& places)
        : kernels_(kernels), heads_(heads), cache_(cache), places_(places),
          dot_(kernels.dot[static_cast<int>(Format::bf16)]) {}

    // Rows of the tile are (token, head) for `run`'s tokens and query heads [head, head + shared).
    void run(const float* queries, const Run& run, int head, int shared, float* out) {
        const int* positions = places_.positions + run.first;
        const int T = run.count * shared, kv_head = head / (heads_.heads / heads_.kv_heads);
        const int last = positions[run.count - 1], reach = heads_.window;
        const int begin = reach ? std::max(0, positions[0] + 1 - reach) / BLOCK * BLOCK : 0;
        const int end = (last + BLOCK) / BLOCK * BLOCK;
        stretch(places_.blocks_of(run.first), begin, end);
        round_queries(queries, run, head, shared);
        score(kv_head, T);
        for (int i = 0; i < T; i++) {
            const int position = positions[i / shared];
            const int from = reach ? std::max(begin, position + 1 - reach) : begin;
            normalise(i, T, from - begin, position + 1 - begin, end - begin, head + i % shared);
        }
        weigh(kv_head, T);
        for (int i = 0; i < T; i++) {
            float* to = out + row_of(run, head, shared, i);
            const float sum = sums_[i];
            for (int d = 0; d < heads_.head_dim; d += ROWS) {
                const float* from = &weighed_[static_cast<size_t>(d) * T + i * ROWS];
                const int rows = std::min(ROWS, heads_.head_dim - d);
                for (int r = 0; r < rows; r++) to[d + r] = from[r] / sum;
            }
        }
    }

private:
    // Where row i of the tile lies among queries, and in the output.
    size_t row_of(const Run& run, int head, int shared, int i) const {
        return (static_cast<size_t>(run.first + i / shared) * heads_.heads + head + i % shared) * heads_.head_dim;
    }

    void stretch(const int32_t* blocks, int begin, int end) {
        stretches_.clear();
        for (int at = begin, size = cache_.block_size; at < end;) {
            const int stop = std::min(end, (at / size + 1) * size);
            stretches_.push_back({blocks[at / size], at % size, at - begin, stop - begin});
            at = stop;
        }
    }

    void round_queries(const float* queries, const Run& run, int head, int shared) {
        const int d = heads_.head_dim, T = run.count * shared, blocks = cache_.width / BLOCK;
        queries_.assign(static_cast<size_t>(T) * cache_.width, 0);
        for (int i = 0; i < T; i++) {
            const float* row = queries + row_of(run, head, shared, i);
            for (int b = 0; b < blocks; b++)
                kernels_.round_bf16(row + b * BLOCK, std::min(BLOCK, d - b * BLOCK),
                                    queries_.data() + (static_cast<size_t>(b) * T + i) * BLOCK);
        }
    }

    // What to fetch meanwhile: the next block of the cache, which lies anywhere. With many tokens on each value
    // memory is fast enough.
    static Ahead ahead(const uint16_t* panel, int T) {
        if (!panel || T > FEW) return {};
        return {reinterpret_cast<const uint8_t*>(panel), static_cast<int>(code_bytes(Format::bf16) / 64), nullptr};
    }

    // scores_ (T, span)
    void score(int kv_head, int T) {
        const int span = stretches_.back().end, blocks = cache_.width / BLOCK;
        const Tile tile{nullptr, nullptr, nullptr, queries_.data(), T};
        const float scale = heads_.scale;
        alignas(64) float part[MAX_TOKENS * ROWS];
        scores_.resize(static_cast<size_t>(T) * span);
        for (const Stretch& s : stretches_) {
            const uint16_t* keys = cache_.keys_of(s.block, kv_head) + static_cast<size_t>(s.offset) * cache_.width;
            const uint16_t* next = &s == &stretches_.back() ? cache_.values_of(stretches_[0].block, kv_head)
                                                            : cache_.keys_of((&s + 1)->block, kv_head);
            const size_t panel = static_cast<size_t>(ROWS) * cache_.width;
            for (int at = s.begin; at < s.end; at += ROWS, keys += panel, next += panel) {
                dot_(reinterpret_cast<const uint8_t*>(keys), blocks, tile, ahead(next, T), part);
                float* to = scores_.data() + at;
                for (int i = 0; i < T; i++, to += span)
                    for (int r = 0; r < ROWS; r++) to[r] = part[i * ROWS + r] * scale;
            }
        }
    }

    // Row i of the scores to probabilities of positions [from, to), zero elsewhere, rounded into a tile;
    // what they must be divided by stays in sums_.
    void normalise(int i, int T, int from, int to, int span, int head) {
        float* row = scores_.data() + static_cast<size_t>(i) * span;
        float largest = kernels_.largest(row + from, to - from);
        if (heads_.sinks) largest = std::max(largest, heads_.sinks[head]);
        sums_[i] = kernels_.exponentials(row + from, to - from, largest);
        if (heads_.sinks) sums_[i] += std::exp(heads_.sinks[head] - largest);
        std::fill(row, row + from, 0.0f);
        std::fill(row + to, row + span, 0.0f);
        weights_.resize(scores_.size());
        for (int b = 0; b < span / BLOCK; b++)
            kernels_.round_bf16(row + b * BLOCK, BLOCK, weights_.data() + (static_cast<size_t>(b) * T + i) * BLOCK);
    }

    // weighed_ (width / 16, T, 16): a sum over blocks of the cache, in order. A block that a token does not see, but
    // others of its tile do, adds zeros.
    void weigh(int kv_head, int T) {
        alignas(64) float part[MAX_TOKENS * ROWS];
        weighed_.resize(static_cast<size_t>(T) * cache_.width);
        for (const Stretch& s : stretches_) {
            const uint16_t* panel = cache_.values_of(s.block, kv_head) + static_cast<size_t>(s.offset) * ROWS;
            const uint16_t* next = &s == &stretches_.back() ? nullptr : cache_.values_of((&s + 1)->block, kv_head);
            const Tile tile{nullptr, nullptr, nullptr, weights_.data() + static_cast<size_t>(s.begin) * T, T};
            const size_t step = static_cast<size_t>(ROWS) * cache_.block_size;
            float* sum = weighed_.data();
            for (int d = 0; d < heads_.head_dim; d += ROWS, panel += step, sum += T * ROWS) {
                float* to = s.begin == 0 ? sum : part;
                dot_(reinterpret_cast<const uint8_t*>(panel), (s.end - s.begin) / BLOCK, tile, ahead(next, T), to);
                if (next) next += step;
                if (to == part) kernels_.add_scaled(part, 1, T * ROWS, sum);
            }
        }
    }

    const Kernels& kernels_;
    const Heads& heads_;
    const Cache& cache_;
    const Places& places_;
    Dot dot_;
    std::vector<Stretch> stretches_;
    Aligned<uint16_t> queries_, weights_;
    Aligned<float> scores_, weighed_;
    float sums_[MAX_TOKENS];
};

}  // namespace

void attend(Pool& pool, const Kernels& kernels, const Heads& heads, const Cache& cache, const float* queries,
            const Places& places, const std::function<void(size_t, size_t)>& prepare, float* out) {
    const int group = heads.heads / heads.kv_heads, tiles = places.tokens * heads.kv_heads;
    // The query heads of a key head in as few pieces as fit a tile each, or in more where threads would be idle.
    const int least = (group + MAX_TOKENS - 1) / MAX_TOKENS, most = std::min(group, pool.size() / std::max(1, tiles));
    const int shared = (group - 1) / std::max(least, most) + 1, pieces = (group - 1) / shared + 1;
    const int32_t *sequences = places.sequences, *end_of_sequences = sequences + places.tokens;
    const auto runs = cut(places, MAX_TOKENS / shared);
    const size_t per_run = static_cast<size_t>(heads.kv_heads) * pieces;
    // One token a sequence reads what itself wrote: one round of the threads does both. Tokens that read each
    // other's wait for all.
    const bool alone = pieces == 1 && std::adjacent_find(sequences, end_of_sequences) == end_of_sequences;
    if (!alone && prepare) {
        pool.run(static_cast<size_t>(places.tokens) * heads.kv_heads, 1, [&](size_t begin, size_t end) {
            for (size_t item = begin; item < end; item++) prepare(item / heads.kv_heads, item % heads.kv_heads);
        });
    }
    // From the first run to the last: ranges of runs get shorter as runs get longer, so that all threads end together.
    pool.run(runs.size() * per_run, 1, [&](size_t begin, size_t end) {
        Scorer scorer(kernels, heads, cache, places);
        for (size_t item = begin; item < end; item++) {
            const Run& run = runs[item / per_run];
            const int which = static_cast<int>(item % per_run);
            const int head = which / pieces * group + which % pieces * shared;
            const int here = std::min(shared, (which / pieces + 1) * group - head);
            if (alone && prepare) prepare(run.first, which);
            scorer.run(queries, run, head, here, out);
        }
    });
}

}  // namespace tenfold
