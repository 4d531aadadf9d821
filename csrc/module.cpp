// What Python sees. Tensors cross as addresses: tenfold/kernels/native.py checks them and keeps them alive.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <iterator>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <tuple>

#include "ceilings.hpp"
#include "crc32.hpp"
#include "layer.hpp"
#include "lost_file.hpp"
#include "quantize.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace tenfold;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

std::atomic<int> wanted_threads = 1;
std::mutex one_call;  // a pool serves one caller at a time; it guards what follows
double busy_seconds = 0;  // since the module was loaded
int pool_threads = 0;  // that the pool was asked to have
// Itself never destroyed: at exit its threads may be at work, or in a fork not be there to be waited for.
std::unique_ptr<Pool>& the_pool = *new std::unique_ptr<Pool>;

Pool& pool() {
    if (!the_pool || pool_threads != wanted_threads) {
        pool_threads = wanted_threads;
        the_pool = std::make_unique<Pool>(pool_threads);
    }
    return *the_pool;
}

// A fork waits for the call under way; its child has none of the threads, and makes its own when it needs them.
void prepare_for_forks() {
    pthread_atfork(
        [] {
            one_call.lock();
            Store::before_fork();
        },
        [] {
            Store::after_fork(false);
            one_call.unlock();
        },
        [] {
            Store::after_fork(true);
            static_cast<void>(the_pool.release());
            one_call.unlock();
        });
}

double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Never within `work`: whoever has Python's lock may be waiting for ours.
void hear_signals() {
    if (PyErr_CheckSignals()) throw nb::python_error();
}

// Work on the pool, without Python's lock. False where a disk has kept it waiting: then it must be done again.
template <class F>
bool try_work(const F& f) {
    const Kernels& set = kernels();
    nb::gil_scoped_release unlocked;
    std::lock_guard<std::mutex> alone(one_call);
    const auto start = std::chrono::steady_clock::now();
    bool done = true;
    try {
        f(pool(), set);
    } catch (const Stalled&) {
        done = false;
    }
    busy_seconds += seconds_since(start);
    return done;
}

// The same until it is done. Ctrl-C ends it between two tries.
template <class F>
void work(const F& f) {
    while (!try_work(f)) hear_signals();
}

// The chunks of a pass (engine/batch.py), which `check` has seen, as the kernels need them. Here and not in Python,
// which would take longer than a layer of one token: all that it touches has left the caches since the token before.
struct Chunks {
    using Chunk = std::tuple<std::vector<int32_t>, int, std::vector<int32_t>, int>;  // blocks, start, ids, wanted

    std::vector<int32_t> tables, sequences, positions, ids;
    std::vector<int32_t> rows;  // tokens whose logits are wanted
    size_t width = 0;  // of the tables

    Chunks(const std::vector<Chunk>& chunks, int num_blocks) {
        for (const auto& [blocks, start, new_ids, wanted] : chunks) width = std::max(width, blocks.size());
        for (const auto& [blocks, start, new_ids, wanted] : chunks) {
            const auto is_there = [&](int32_t block) { return block >= 0 && block < num_blocks; };
            if (blocks.empty() || !std::all_of(blocks.begin(), blocks.end(), is_there))
                throw std::out_of_range("the blocks of a chunk are none of the cache's");
            sequences.insert(sequences.end(), new_ids.size(), static_cast<int32_t>(tables.size() / width));
            tables.insert(tables.end(), blocks.begin(), blocks.end());
            tables.resize(tables.size() + width - blocks.size());
            for (size_t i = 0; i < new_ids.size(); i++) positions.push_back(start + static_cast<int32_t>(i));
            ids.insert(ids.end(), new_ids.begin(), new_ids.end());
            for (int row = tokens() - wanted; row < tokens(); row++) rows.push_back(row);
        }
    }

    int tokens() const { return static_cast<int>(ids.size()); }
    Places places() const {
        return {tables.data(), static_cast<int>(width), sequences.data(), positions.data(), tokens()};
    }
};

// Layers [first, end), each the feed-forward of the layer before it and then its own attention: the last layer's
// feed-forward is left, for only tokens that predict need it; with the logits of those it ends the last layer's turn.
// One call for all: between layers Python would find its own code gone from the caches, for the weights that came
// through. A prompt or a disk, where that matters less, can be interrupted.
struct Decoder {
    std::vector<DecoderLayer> layers;
    std::vector<Cache> caches;
    Ending ending;

    // `chosen` (layers - 1, tokens, top_k) and `chosen_last` (tokens whose logits are wanted, top_k) are told which
    // experts were used. Of the last layer, x has the tokens alone whose logits are wanted, or all rows.
    void operator()(Address x, const Chunks& chunks, size_t first, size_t end, Address chosen, int top_k,
                    Address chosen_last, Address logits, bool all_rows) const {
        const auto start = std::chrono::steady_clock::now();
        const Places places = chunks.places();
        const int tokens = places.tokens;
        for (size_t n = first; n < end; hear_signals()) {
            try_work([&](Pool& pool, const Kernels& set) {
                const auto begun = std::chrono::steady_clock::now();
                do {
                    if (n > 0)
                        layers[n - 1].run_feed_forward(pool, set, at<float>(x), tokens,
                                                       at<int32_t>(chosen) + (n - 1) * tokens * top_k);
                    foresee(pool, set, n, at<float>(x), tokens);
                    if (n + 1 < layers.size() || all_rows)
                        layers[n].run_attention(pool, set, caches[n], places, at<float>(x));
                    else
                        layers[n].run_last_attention(pool, set, caches[n], places, chunks.rows, at<float>(x));
                } while (++n < end && seconds_since(begun) < PATIENCE);
                const bool whole = first == 0 && n == layers.size();
                if (whole && tokens <= FEW && store()) store()->look_ahead.step(seconds_since(start));
            });
        }
        if (end == layers.size()) finish(x, chunks, chosen_last, logits);
    }

private:
    // More of them want most experts, and there is nothing to predict.
    static constexpr int FEW = 8;
    // Eighths of a token's experts that are sure enough to be read, of its next layer, of the one after it, and so on.
    static constexpr int SURE[] = {8, 4, 3, 2, 1};
    static constexpr double PATIENCE = 0.05;  // seconds, of who presses Ctrl-C

    // What is left after all layers, for the tokens whose logits are wanted: the last feed-forward, and those.
    void finish(Address x, const Chunks& chunks, Address chosen, Address logits) const {
        if (chunks.rows.empty()) return;
        const DecoderLayer& last = layers.back();
        const int count = static_cast<int>(chunks.rows.size());
        Floats kept(chunks.rows.size() * last.hidden);
        for (size_t i = 0; i < chunks.rows.size(); i++)
            std::copy_n(at<const float>(x) + static_cast<size_t>(chunks.rows[i]) * last.hidden, last.hidden,
                        &kept[i * last.hidden]);
        work([&](Pool& pool, const Kernels& set) {  // where it is done again, nothing has been added to `kept`
            last.run_feed_forward(pool, set, kept.data(), count, at<int32_t>(chosen));
            ending.run(pool, set, kept.data(), count, at<float>(logits));
        });
    }

    // What layers n and after seem to want, before the attention of layer n, which changes less than experts do; of
    // many tokens, or where looking costs more than it brings, nothing.
    void foresee(Pool& pool, const Kernels& set, size_t n, const float* x, int tokens) const {
        if (!store()) return;
        std::deque<Wanted> experts;
        const size_t looks = tokens <= FEW && store()->looks_ahead() ? std::size(SURE) : 0;
        for (size_t i = 0; i < std::min(looks, layers.size() - n); i++)
            layers[n + i].foresee(pool, set, x, tokens, SURE[i], experts);
        store()->foresee(std::move(experts));
    }

    // The model's, which all sparse layers have.
    Store* store() const {
        for (const DecoderLayer& layer : layers)
            if (layer.feed_forward.experts.store) return layer.feed_forward.experts.store;
        return nullptr;
    }
};

Linear new_linear(Address panels, int format, int rows, int columns, Address bias) {
    return {{at<const uint8_t>(panels), static_cast<Format>(format), rows, columns}, at<const float>(bias)};
}

}  // namespace

NB_MODULE(_native, m) {
    prepare_for_forks();
    m.def("set_threads", [](int threads) { wanted_threads = std::max(1, threads); });
    m.def("threads", [] { return wanted_threads.load(); });
    m.def("isa", [] { return std::string(kernels().name); });
    m.def("isas", [] {
        std::vector<std::string> names;
        for (const Kernels* set : supported_kernels()) names.emplace_back(set->name);
        return names;
    });

    nb::class_<Linear>(m, "Linear")
        .def(nb::new_(&new_linear), "panels"_a, "format"_a, "rows"_a, "columns"_a, "bias"_a = 0)
        .def("__call__", [](const Linear& self, Address x, int tokens, Address y) {
            work([&](Pool& pool, const Kernels& set) {
                linear(pool, set, {{self.matrix, self.bias, at<float>(y)}}, at<const float>(x), tokens);
            });
        })
        .def("rows", [](const Linear& self, Address ids, int count, Address out) {
            for (int i = 0; i < count; i++)
                self.matrix.row(at<const int32_t>(ids)[i], at<float>(out) + static_cast<size_t>(i) * self.matrix.columns);
        });

    nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
        try {
            std::rethrow_exception(thrown);
        } catch (const ReadError& error) {
            const nb::object text = nb::steal(PyUnicode_DecodeFSDefault(error.what()));
            PyErr_SetObject(nb::module_::import_("tenfold.errors").attr("TenfoldError").ptr(), text.ptr());
        }
    });
    m.def("end_where_a_file_is_lost", &end_where_a_file_is_lost);
    m.def("crc32", [](Address data, size_t size) {
        uint32_t sum = 0;
        work([&](Pool& pool, const Kernels&) { sum = crc32(pool, at<const uint8_t>(data), size); });
        return sum;
    });
    m.def("read_file", [](const nb::bytes& path, uint64_t offset, size_t size, Address to) {
        const nb::gil_scoped_release unlocked;
        File(path.c_str()).read(offset, size, at<uint8_t>(to));
    });

    nb::class_<Store>(m, "Store")
        .def("__init__", [](Store* self, const std::vector<nb::bytes>& files, const std::vector<nb::tuple>& layers,
                            size_t slots) {
            std::vector<std::string> paths;
            for (const nb::bytes& path : files) paths.emplace_back(path.c_str());
            std::vector<StoredLayer> stored;
            for (const nb::tuple& layer : layers)
                stored.push_back({nb::cast<int>(layer[0]), nb::cast<int>(layer[1]), nb::cast<uint64_t>(layer[2]),
                                  nb::cast<size_t>(layer[3]), nb::cast<std::vector<uint32_t>>(layer[4])});
            new (self) Store(paths, std::move(stored), slots);
        }, "files"_a, "layers"_a, "slots"_a)
        .def("warm", [](Store& self, int layer, const std::vector<int32_t>& experts) {
            work([&](Pool& pool, const Kernels&) {
                Visit visit(self, layer, experts.data(), 1, static_cast<int>(experts.size()));
                for (size_t first = 0; first < visit.experts().size();) first = visit.ready(pool, first);
            });
            hear_signals();
        }, "layer"_a, "experts"_a)
        .def("meter", [](Store& self) {
            const StoreMeter meter = self.meter();
            return nb::make_tuple(meter.hits, meter.misses, meter.bytes_read, meter.wait_seconds, meter.prefetched,
                                  meter.prefetched_used, meter.prefetched_late);
        });

    nb::class_<Experts>(m, "Experts")
        .def(nb::new_([](Address records, size_t record_bytes, int format, int experts, int width, int hidden,
                         Address gate_up_bias, Address down_bias, bool clamped) {
                 return Experts{at<const uint8_t>(records), record_bytes, nullptr, 0, static_cast<Format>(format),
                                experts, width, hidden, at<const float>(gate_up_bias), at<const float>(down_bias),
                                clamped};
             }),
             "records"_a, "record_bytes"_a, "format"_a, "experts"_a, "width"_a, "hidden"_a, "gate_up_bias"_a = 0,
             "down_bias"_a = 0, "clamped"_a = false)
        .def_static("streamed", [](Store& store, int layer, int format, int experts, int width, int hidden,
                                   Address gate_up_bias, Address down_bias, bool clamped) {
            return Experts{nullptr, 0, &store, layer, static_cast<Format>(format), experts, width, hidden,
                           at<const float>(gate_up_bias), at<const float>(down_bias), clamped};
        }, "store"_a, "layer"_a, "format"_a, "experts"_a, "width"_a, "hidden"_a, "gate_up_bias"_a = 0,
           "down_bias"_a = 0, "clamped"_a = false)
        .def("__call__", [](const Experts& self, Address x, int tokens, Address ids, Address weights, int top_k,
                            Address out) {
            work([&](Pool& pool, const Kernels& set) {
                run_experts(pool, set, self, at<const float>(x), tokens, at<const int32_t>(ids),
                            at<const float>(weights), top_k, at<float>(out));
            });
        });

    nb::class_<Router>(m, "Router")
        .def(nb::new_([](Address weight, bool in_bf16, int experts, int hidden, int top_k, int choice, Address logit_bias,
                         Address selection_bias, bool renormalise, int groups, int top_groups, float scale) {
                 return Router{at<const float>(in_bf16 ? 0 : weight), at<const uint16_t>(in_bf16 ? weight : 0),
                               at<const float>(logit_bias), at<const float>(selection_bias),
                               experts, hidden, top_k, static_cast<Choice>(choice), renormalise, groups, top_groups,
                               scale};
             }),
             "weight"_a, "in_bf16"_a, "experts"_a, "hidden"_a, "top_k"_a, "choice"_a, "logit_bias"_a, "selection_bias"_a,
             "renormalise"_a, "groups"_a, "top_groups"_a, "scale"_a)
        .def("__call__", [](const Router& self, Address x, int tokens, Address ids, Address weights) {
            work([&](Pool& pool, const Kernels& set) {
                route(pool, set, self, at<const float>(x), tokens, at<int32_t>(ids), at<float>(weights));
            });
        });

    nb::class_<Attention>(m, "Attention")
        .def(nb::new_([](const Linear& q, const Linear& k, const Linear& v, const Linear& o, int heads, int kv_heads,
                         int head_dim, float scale, int window, Address sinks, Address q_norm, Address k_norm,
                         bool norm_per_head, float eps) {
                 return Attention{q, k, v, o, {heads, kv_heads, head_dim, scale, window, at<const float>(sinks)},
                                  at<const float>(q_norm), at<const float>(k_norm), norm_per_head, eps};
             }),
             "q"_a, "k"_a, "v"_a, "o"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "scale"_a, "window"_a, "sinks"_a,
             "q_norm"_a, "k_norm"_a, "norm_per_head"_a, "eps"_a);

    nb::class_<LatentAttention>(m, "LatentAttention")
        .def(nb::new_([](const Linear* q_a, Address q_a_norm, const Linear& q, const Linear& kv_a, Address kv_a_norm,
                         Address key_up, Address value_up, const Linear& o, int heads, int rank, int plain, int rotary,
                         int value, float scale, int window, float eps) {
                 return LatentAttention{q_a ? std::optional(*q_a) : std::nullopt, q, kv_a, o,
                                        at<const float>(q_a_norm), at<const float>(kv_a_norm),
                                        {at<const uint8_t>(key_up), Format::bf16, rank, plain},
                                        {at<const uint8_t>(value_up), Format::bf16, value, rank},
                                        {heads, 1, rank + rotary, scale, window}, rank, plain, value, eps};
             }),
             "q_a"_a.none(), "q_a_norm"_a, "q"_a, "kv_a"_a, "kv_a_norm"_a, "key_up"_a, "value_up"_a, "o"_a, "heads"_a,
             "rank"_a, "plain"_a, "rotary"_a, "value"_a, "scale"_a, "window"_a, "eps"_a);

    nb::class_<FeedForward>(m, "FeedForward")
        .def(nb::new_([](const Linear* gate_up, const Linear* down, Address gate, const Router* router,
                         const Experts* experts) {
                 FeedForward made;
                 made.has_dense = gate_up != nullptr;
                 if (gate_up) made.dense = {*gate_up, *down};
                 made.dense_gate = at<const float>(gate);
                 made.has_experts = experts != nullptr;
                 if (experts) made.router = *router, made.experts = *experts;
                 return made;
             }),
             "gate_up"_a.none(), "down"_a.none(), "gate"_a, "router"_a.none(), "experts"_a.none());

    nb::class_<DecoderLayer>(m, "Layer")
        .def(nb::new_([](const Attention* attention, const LatentAttention* latent, const FeedForward& feed_forward,
                         Address input_norm, Address post_norm, float eps, float residual, int hidden, Address cos,
                         Address sin, int rotary_dim, bool interleave) {
                 return DecoderLayer{attention ? *attention : Attention{},
                                     latent ? std::optional(*latent) : std::nullopt,
                                     feed_forward, at<const float>(input_norm), at<const float>(post_norm), eps,
                                     residual, hidden,
                                     {at<const float>(cos), at<const float>(sin), rotary_dim, interleave}};
             }),
             "attention"_a.none(), "latent"_a.none(), "feed_forward"_a, "input_norm"_a, "post_norm"_a, "eps"_a,
             "residual"_a, "hidden"_a, "cos"_a, "sin"_a, "rotary_dim"_a, "interleave"_a);

    nb::class_<Chunks>(m, "Chunks")
        .def(nb::init<const std::vector<Chunks::Chunk>&, int>(), "chunks"_a, "num_blocks"_a)
        .def_prop_ro("tokens", &Chunks::tokens)
        .def_prop_ro("wanted", [](const Chunks& self) { return self.rows.size(); })
        .def_prop_ro("ids", [](const Chunks& self) { return reinterpret_cast<Address>(self.ids.data()); });

    nb::class_<Decoder>(m, "Decoder")
        .def(nb::new_([](const std::vector<DecoderLayer>& layers, const std::vector<Address>& keys,
                         const std::vector<Address>& values, int block_size, const Linear& head, Address norm,
                         float eps) {
                 Decoder made{layers, {}, {head, at<const float>(norm), eps}};
                 for (size_t n = 0; n < layers.size(); n++) {
                     const Heads& heads = layers[n].heads();
                     made.caches.push_back({at<uint16_t>(keys[n]), at<uint16_t>(values[n]), block_size, heads.kv_heads,
                                            blocks_of(heads.head_dim) * BLOCK});
                 }
                 return made;
             }),
             "layers"_a, "keys"_a, "values"_a, "block_size"_a, "head"_a, "norm"_a, "eps"_a)
        .def("__call__", &Decoder::operator(), "x"_a, "chunks"_a, "first"_a, "end"_a, "chosen"_a, "top_k"_a,
             "chosen_last"_a, "logits"_a, "all_rows"_a);

    m.def("busy_seconds", [] {
        nb::gil_scoped_release unlocked;
        std::lock_guard<std::mutex> alone(one_call);
        return busy_seconds;
    });
    m.def("quantize", [](int format, Address weights, int rows, int columns, Address importance, Address panels) {
        work([&](Pool& pool, const Kernels&) {
            quantize(pool, static_cast<Format>(format), at<const float>(weights), rows, columns,
                     at<const float>(importance), at<uint8_t>(panels));
        });
    });
    m.def("read_seconds", [](int threads, Address from, size_t bytes) {
        nb::gil_scoped_release unlocked;
        return read_seconds(threads, at<const uint8_t>(from), bytes);
    });
    m.def("peak", &peak, "kind"_a, "isa"_a, "threads"_a, nb::call_guard<nb::gil_scoped_release>());

    m.def("rms_norm", [](Address x, Address weight, int tokens, int hidden, float eps, Address y) {
        work([&](Pool&, const Kernels& set) {
            for (int t = 0; t < tokens; t++)
                set.rms_norm(at<const float>(x) + static_cast<size_t>(t) * hidden, at<const float>(weight), hidden, eps,
                             at<float>(y) + static_cast<size_t>(t) * hidden);
        });
    });
}
