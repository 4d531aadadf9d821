#include "attention.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "matmul.hpp"

namespace tenfold {

void Cache::write(int sequence, int head, int position, const float* key, const float* value, int head_dim) const {
    uint16_t* k = keys_of(sequence, head) + static_cast<size_t>(position / ROWS) * ROWS * width;
    for (int d = 0; d < head_dim; d++) k[bf16_place(position % ROWS, d)] = to_bf16(key[d]);
    uint16_t* v = values_of(sequence, head);
    for (int d = 0; d < head_dim; d++)
        v[static_cast<size_t>(d / ROWS) * ROWS * capacity + bf16_place(d % ROWS, position)] = to_bf16(value[d]);
}

namespace {

// A few neighbouring tokens of one sequence.
struct Run {
    int first, count;
};

// As many tokens together as give a full tile with the query heads that share a key head.
std::vector<Run> cut(const int32_t* sequences, const int32_t* positions, int tokens, int most) {
    std::vector<Run> runs;
    for (int t = 0; t < tokens; t++) {
        const bool follows = t && sequences[t] == sequences[t - 1] && positions[t] == positions[t - 1] + 1;
        if (follows && runs.back().count < most)
            runs.back().count++;
        else
            runs.push_back({t, 1});
    }
    return runs;
}

// One tile of at most 16 queries that share a key head, with the memory it works in.
class Scorer {
public:
    Scorer(const Kernels& kernels, const Heads& heads, const Cache& cache)
        : kernels_(kernels), heads_(heads), cache_(cache), dot_(kernels.dot[static_cast<int>(Format::bf16)]) {}

    // Rows of the tile are (token, head) for `run`'s tokens and query heads [head, head + shared).
    void run(const float* queries, const Run& run, int sequence, const int32_t* positions, int head, int shared,
             float* out) {
        const int T = run.count * shared, kv_head = head / (heads_.heads / heads_.kv_heads);
        const int last = positions[run.first + run.count - 1], reach = heads_.window;
        const int begin = reach ? std::max(0, positions[run.first] + 1 - reach) / BLOCK * BLOCK : 0;
        const int end = (last + BLOCK) / BLOCK * BLOCK;
        round_queries(queries, run, head, shared);
        score(cache_.keys_of(sequence, kv_head), begin, end, T);
        for (int i = 0; i < T; i++) {
            const int position = positions[run.first + i / shared];
            const int from = reach ? std::max(begin, position + 1 - reach) : begin;
            normalise(i, T, from - begin, position + 1 - begin, end - begin, head + i % shared);
        }
        weigh(cache_.values_of(sequence, kv_head), begin, end, run, head, shared, out);
    }

private:
    void round_queries(const float* queries, const Run& run, int head, int shared) {
        const int d = heads_.head_dim, T = run.count * shared, blocks = cache_.width / BLOCK;
        queries_.assign(static_cast<size_t>(T) * cache_.width, 0);
        for (int i = 0; i < T; i++) {
            const float* row = queries + (static_cast<size_t>(run.first + i / shared) * heads_.heads + head + i % shared) * d;
            for (int b = 0; b < blocks; b++)
                kernels_.round_bf16(row + b * BLOCK, std::min(BLOCK, d - b * BLOCK),
                                    queries_.data() + (static_cast<size_t>(b) * T + i) * BLOCK);
        }
    }

    // scores_ (T, end - begin)
    void score(const uint16_t* keys, int begin, int end, int T) {
        const int span = end - begin, blocks = cache_.width / BLOCK;
        const Tile tile{nullptr, nullptr, nullptr, queries_.data(), T};
        alignas(64) float part[MAX_TOKENS * ROWS];
        scores_.resize(static_cast<size_t>(T) * span);
        for (int k = begin; k < end; k += ROWS) {
            dot_(reinterpret_cast<const uint8_t*>(keys + static_cast<size_t>(k) * cache_.width), blocks, tile, {}, part);
            for (int i = 0; i < T; i++)
                for (int r = 0; r < ROWS; r++)
                    scores_[static_cast<size_t>(i) * span + k - begin + r] = part[i * ROWS + r] * heads_.scale;
        }
    }

    // Row i of the scores to probabilities of positions [from, to), zero elsewhere, rounded into a tile;
    // what they must be divided by stays in sums_.
    void normalise(int i, int T, int from, int to, int span, int head) {
        float* row = scores_.data() + static_cast<size_t>(i) * span;
        float largest = *std::max_element(row + from, row + to);
        if (heads_.sinks) largest = std::max(largest, heads_.sinks[head]);
        sums_[i] = kernels_.exponentials(row + from, to - from, largest);
        if (heads_.sinks) sums_[i] += std::exp(heads_.sinks[head] - largest);
        std::fill(row, row + from, 0.0f);
        std::fill(row + to, row + span, 0.0f);
        weights_.resize(scores_.size());
        for (int b = 0; b < span / BLOCK; b++)
            kernels_.round_bf16(row + b * BLOCK, BLOCK, weights_.data() + (static_cast<size_t>(b) * T + i) * BLOCK);
    }

    void weigh(const uint16_t* values, int begin, int end, const Run& run, int head, int shared, float* out) {
        const int d = heads_.head_dim, T = run.count * shared;
        const Tile tile{nullptr, nullptr, nullptr, weights_.data(), T};
        alignas(64) float part[MAX_TOKENS * ROWS];
        for (int row = 0; row < d; row += ROWS) {
            const uint16_t* panel = values + static_cast<size_t>(row) * cache_.capacity + static_cast<size_t>(begin) * ROWS;
            dot_(reinterpret_cast<const uint8_t*>(panel), (end - begin) / BLOCK, tile, {}, part);
            for (int i = 0; i < T; i++) {
                float* to = out + (static_cast<size_t>(run.first + i / shared) * heads_.heads + head + i % shared) * d + row;
                for (int r = 0; r < std::min(ROWS, d - row); r++) to[r] = part[i * ROWS + r] / sums_[i];
            }
        }
    }

    const Kernels& kernels_;
    const Heads& heads_;
    const Cache& cache_;
    Dot dot_;
    std::vector<uint16_t> queries_, weights_;
    std::vector<float> scores_;
    float sums_[MAX_TOKENS];
};

}  // namespace

void attend(Pool& pool, const Kernels& kernels, const Heads& heads, const Cache& cache, const float* queries,
            const int32_t* sequences, const int32_t* positions, int tokens,
            const std::function<void(size_t, size_t)>& prepare, float* out) {
    const int group = heads.heads / heads.kv_heads, shared = std::min(group, MAX_TOKENS);
    const int pieces = (group + shared - 1) / shared;  // of the query heads of one key head
    const auto runs = cut(sequences, positions, tokens, MAX_TOKENS / shared);
    const size_t per_run = static_cast<size_t>(heads.kv_heads) * pieces;
    // One token a sequence reads what itself wrote: one round of the threads does both. Tokens that read each
    // other's wait for all.
    const bool alone = pieces == 1 && std::adjacent_find(sequences, sequences + tokens) == sequences + tokens;
    if (!alone) {
        pool.run(static_cast<size_t>(tokens) * heads.kv_heads, 1, [&](size_t begin, size_t end) {
            for (size_t item = begin; item < end; item++) prepare(item / heads.kv_heads, item % heads.kv_heads);
        });
    }
    // From the last run to the first: the longest come first, so that all threads end together.
    pool.run(runs.size() * per_run, 1, [&](size_t begin, size_t end) {
        Scorer scorer(kernels, heads, cache);
        for (size_t item = begin; item < end; item++) {
            const Run& run = runs[runs.size() - 1 - item / per_run];
            const int which = static_cast<int>(item % per_run);
            const int head = which / pieces * group + which % pieces * shared;
            const int here = std::min(shared, (which / pieces + 1) * group - head);
            if (alone) prepare(run.first, which);
            scorer.run(queries, run, sequences[run.first], positions, head, here, out);
        }
    });
}

}  // namespace tenfold
