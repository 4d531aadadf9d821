"""Traces: what is recorded against the models' own routers, the policies against plain simulations."""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_families import random_fields
from test_cli import run
from test_packed_engine import build

from tenfold import compiled
from tenfold.checkpoint import save_model
from tenfold.checkpoint.pack.packing import pack
from tenfold.config import ModelConfig
from tenfold.engine.packed import PackedRunner
from tenfold.errors import TenfoldError
from tenfold.formats import Packing
from tenfold.model.transformer import Transformer
from tenfold.packed import load_packed, packed_of, read_packed
from tenfold.tokenizer import Tokenizer, train_bpe
from tenfold.trace import simulate
from tenfold.trace import trace as trace_verb
from tenfold.trace.analysis import analyse
from tenfold.trace.file import Ids, Trace, hottest, load, save
from tenfold.trace.record import trace_of
from tenfold.trace.routes import RoutingRunner

needs_kernels = pytest.mark.skipif(
    not compiled.available(), reason="no compiled kernels in this installation"
)

SPARSE = ["qwen3_moe", "olmoe", "mixtral", "qwen2_moe", "granitemoe", "gpt_oss", "deepseek_v2", "deepseek_v3"]
SHAPE = {
    "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


# Recording


def windows(model: Transformer, *sizes: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randint(0, model.config.vocab_size, (size,)) for size in sizes]


def own_choices(model: Transformer, parts: list[torch.Tensor]) -> Ids:
    """(T, L, K) as the model hands them back itself."""
    by_window = []
    with torch.inference_mode():
        for part in parts:
            _, aux = model(part[None], return_aux=True)
            by_window.append(torch.stack([layer.expert_ids_TK for layer in aux], dim=1))
    return torch.cat(by_window).numpy()


@pytest.mark.parametrize("family", SPARSE)
def test_what_is_recorded_is_what_the_routers_chose(family: str) -> None:
    model = build(random_fields(family, 2), 2)
    parts = windows(model, 20, 1, 9)
    trace = trace_of(model, "test", {"a": parts[:2], "b": parts[2:]})
    np.testing.assert_array_equal(trace.experts_TLK, own_choices(model, parts))
    assert [(part.kind, part.tokens) for part in trace.header.segments] == [("a", 21), ("b", 9)]
    assert not model.layers[0].post_attention_layernorm._forward_pre_hooks


@needs_kernels
@pytest.mark.parametrize("family", SPARSE)
def test_a_packed_model_is_recorded_alike(family: str) -> None:
    """But for activations in bf16, by which two experts that score alike may change places."""
    model = build(random_fields(family, 2), 2)
    parts = windows(model, 30, 11)
    wanted, packed = trace_of(model, "t", {"a": parts}), packed_of(model, "bf16", "bf16")
    got = trace_of(packed, "t", {"a": parts})
    assert got.header == wanted.header.model_copy(update={"expert_bytes": got.header.expert_bytes})
    for ours, theirs in ((got.experts_TLK, wanted.experts_TLK), (got.lookahead_TLK, wanted.lookahead_TLK)):
        assert ours.shape == theirs.shape
        assert (np.sort(ours) == np.sort(theirs)).mean() > 0.9


@needs_kernels
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_being_watched_changes_nothing(family: str) -> None:
    model = packed_of(build(random_fields(family, 2), 2))
    ids_BS = windows(build(random_fields(family, 2), 2), 17)[0][None]
    watched = RoutingRunner(model, 20, lambda layer, route: None)
    for part_BS in (ids_BS[:, :12], ids_BS[:, 12:13], ids_BS[:, 13:]):
        watched_BV = watched.forward(part_BS)
    plain = PackedRunner(model, 1, 20)
    for part_BS in (ids_BS[:, :12], ids_BS[:, 12:13], ids_BS[:, 13:]):
        plain_BV = plain.forward(part_BS)
    assert torch.equal(watched_BV, plain_BV)


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=needs_kernels)])
def test_lookahead_is_right_where_nothing_happens_in_between(packed: bool) -> None:
    """Layer 1 adds nothing to what its router saw, nor does layer 2's attention; layer 1's does."""
    model = build(SHAPE)
    model.layers[1].mlp.experts.down.data.zero_()
    model.layers[2].self_attn.o_proj.weight.data.zero_()
    model.layers[2].post_attention_layernorm.weight.data.copy_(
        model.layers[1].post_attention_layernorm.weight
    )
    trace = trace_of(packed_of(model, "bf16", "bf16") if packed else model, "t", {"a": windows(model, 40)})
    assert trace.header.foreseen == (1, 2)
    found = analyse(trace)
    assert found["lookahead_layers"] == [1, 2]
    assert found["lookahead"][1] == 1
    assert found["lookahead"][0] < 1
    np.testing.assert_array_equal(trace.lookahead_TLK[:, 1], trace.experts_TLK[:, 2])


def test_a_model_whose_only_experts_are_first_foresees_nothing(tmp_path: Path) -> None:
    model = build(SHAPE | {"num_hidden_layers": 1})
    save(trace_of(model, "t", {"a": windows(model, 40)}), tmp_path / "trace")
    assert analyse(load(tmp_path / "trace"))["lookahead"] == []


# Policies, against simulations that take the definitions word by word

CALLS = st.integers(2, 7).flatmap(
    lambda E: st.tuples(
        st.just(E),
        st.integers(1, 3),
        st.integers(1, min(3, E)),
    ).flatmap(
        lambda sizes: st.tuples(
            st.just(sizes[0]),
            st.lists(
                st.lists(
                    st.permutations(range(sizes[0])).map(lambda order: order[: sizes[2]]),
                    min_size=sizes[1],
                    max_size=sizes[1],
                ),
                min_size=1,
                max_size=12,
            ).map(lambda calls: np.array(calls, np.uint8)),
        )
    )
)
"""The number of experts of a layer, and ids (T, L, K)."""


def plainly(calls: list[list[int]], slots: int, rank: Callable[[int, int], float]) -> int:
    """Hits of a store that lets go first what ranks lowest: rank(number of the call, expert)."""
    held: set[int] = set()
    hits = 0
    for number, call in enumerate(calls):
        hits += len(held & set(call))
        for expert in call:
            if expert in held:
                continue
            others = sorted(held - set(call), key=lambda other: (rank(number, other), other))
            if len(held) == slots:
                if not others:
                    continue
                held.remove(others[0])
            held.add(expert)
    return hits


@given(CALLS, st.integers(1, 9))
def test_lru_is_what_a_plain_simulation_says(given_calls: tuple[int, Ids], room: int) -> None:
    E, ids_TLK = given_calls
    room = max(ids_TLK.shape[2], min(room, E))
    hits_LC = simulate.lru_hits(simulate.reuse_distances(ids_TLK, E), E)
    for layer in range(ids_TLK.shape[1]):
        calls = ids_TLK[:, layer].tolist()

        def last_use(number: int, expert: int, calls: list[list[int]] = calls) -> float:
            times = [(n, call.index(expert)) for n, call in enumerate(calls[:number]) if expert in call]
            return max(n * 100 + place for n, place in times)

        assert hits_LC[layer, room] == plainly(calls, room, last_use)


@given(CALLS, st.integers(1, 12))
def test_fitted_shares_are_the_best_there_are(given_calls: tuple[int, Ids], slots: int) -> None:
    E, ids_TLK = given_calls
    hits_LC = simulate.lru_hits(simulate.reuse_distances(ids_TLK, E), E)
    shares = itertools.product(range(E + 1), repeat=len(hits_LC))
    best = max(
        sum(int(hits[room]) for hits, room in zip(hits_LC, share, strict=True))
        for share in shares
        if sum(share) <= slots
    )
    assert simulate.fitted_lru(hits_LC, slots)[slots] == best
    assert simulate.equal_lru(hits_LC, min(slots, E * len(hits_LC))) <= best


@settings(max_examples=500)
@given(CALLS, st.integers(1, 12), st.sampled_from([0.37, 2.7, 51.3]))
def test_lfu_is_what_a_plain_simulation_says(
    given_calls: tuple[int, Ids], slots: int, half_life: float
) -> None:
    E, ids_TLK = given_calls
    layers = ids_TLK.shape[1]
    calls = simulate.calls_of(ids_TLK, E).tolist()

    def wait(number: int, expert: int) -> float:
        """Tokens until the expert's layer has its turn, and then until a token is likely to choose it."""
        layer, now = expert // E, number % layers
        ages = [(number - n) // layers for n in range(number + 1) if n % layers == layer]
        weights = [0.5 ** ((age - ages[-1]) / half_life) for age in ages]
        chosen = [expert in calls[n] for n in range(number + 1) if n % layers == layer]
        chance = sum(w for w, c in zip(weights, chosen, strict=True) if c) / sum(weights)
        return round((layer - now - 1) % layers / layers + 1 / max(chance, simulate.RARE), 9)

    wanted = plainly(calls, slots, lambda number, expert: -wait(number, expert))
    assert simulate.lfu(ids_TLK, E, [slots], half_life) == [wanted]


@settings(deadline=None)
@given(CALLS, st.integers(1, 3))
def test_no_policy_beats_the_optimum(given_calls: tuple[int, Ids], slots: int) -> None:
    E, ids_TLK = given_calls
    calls_CK = simulate.calls_of(ids_TLK[:4], E)
    assert simulate.belady(calls_CK, slots) == exhaustive(calls_CK.tolist(), slots)


def exhaustive(calls: list[list[int]], slots: int) -> int:
    """The most hits of all ways to choose what stays after each call."""
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for call in calls:
        after: dict[frozenset[int], int] = {}
        for held, hits in best.items():
            there = sorted(held | set(call))
            for kept in itertools.combinations(there, min(slots, len(there))):
                now = hits + len(held & set(call))
                after[frozenset(kept)] = max(after.get(frozenset(kept), 0), now)
        best = after
    return max(best.values())


def test_long_traces_of_random_use() -> None:
    """Every share of the experts is used alike, so a store of half of them finds half, whatever it knows."""
    rng = np.random.default_rng(0)
    ids = np.array([[rng.permutation(8)[:2] for _ in range(3)] for _ in range(2000)], np.uint8)
    calls_CK = simulate.calls_of(ids, 8)
    few, all_ = simulate.lfu(ids, 8, [12, 24])
    assert few / ids.size == pytest.approx(0.5, abs=0.03)
    assert simulate.belady(calls_CK, 12) > 1.3 * few
    assert simulate.belady(calls_CK, 24) == all_ == ids.size - 24


# Files


@pytest.fixture(scope="module")
def trace() -> Trace:
    model = build(SHAPE | {"mlp_only_layers": [0]})
    return trace_of(model, "a model", {"text": windows(model, 50), "numbers": windows(model, 30)})


def test_a_trace_survives_its_file(trace: Trace, tmp_path: Path) -> None:
    save(trace, tmp_path / "t.safetensors")
    again = load(tmp_path / "t.safetensors")
    assert again.header == trace.header
    np.testing.assert_array_equal(again.experts_TLK, trace.experts_TLK)
    np.testing.assert_array_equal(again.lookahead_TLK, trace.lookahead_TLK)
    assert again.header.layers == (1, 2) == again.header.foreseen
    # 80 tokens, two layers, two experts, chosen and foreseen, a byte each; and what they are of.
    assert (tmp_path / "t.safetensors").stat().st_size < 80 * 2 * 2 * 2 + 1024


def test_many_experts_take_two_bytes(tmp_path: Path) -> None:
    model = build(SHAPE | {"num_experts": 300, "moe_intermediate_size": 4})
    made = trace_of(model, "m", {"a": windows(model, 60)})
    save(made, tmp_path / "t")
    again = load(tmp_path / "t")
    assert again.experts_TLK.dtype == np.uint16 and made.experts_TLK.max() > 255
    np.testing.assert_array_equal(again.experts_TLK, made.experts_TLK)


@given(data=st.data())
@settings(max_examples=300)
def test_a_damaged_file_is_refused_or_says_something(data: st.DataObject, trace: Trace) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "t"
        save(trace, file)
        raw = bytearray(file.read_bytes())
        if data.draw(st.booleans()):
            del raw[data.draw(st.integers(0, len(raw) - 1)) :]
        else:
            for at in data.draw(st.lists(st.integers(0, 900), min_size=1, max_size=4)):
                raw[at] = data.draw(st.integers(0, 255))
        file.write_bytes(raw)
        try:
            analyse(load(file))
        except TenfoldError as error:
            assert str(file) in str(error)


WRONG = [
    ({"num_experts": 5}, "has expert 5 of 5"),
    ({"num_experts_per_tok": 3}, "of shape (80, 2, 3)"),
    ({"layers": [2, 1]}, "layers must rise"),
    ({"layers": [0, 1]}, "of shape (80, 1, 2)"),
    ({"num_experts": 10**9}, "32,768"),
    ({"num_experts": 1}, "more than num_experts 1"),
    ({"segments": [{"kind": "a", "tokens": 10**9}]}, "of shape (1000000000, 2, 2)"),
    ({"segments": [{"kind": "a", "tokens": 40}] * 2}, "different kinds"),
    ({"format": "tenfold-trace-2"}, "tenfold-trace-1"),
    ({"moodel": "x"}, "did you mean model"),
]


@pytest.mark.parametrize(("fields", "words"), WRONG, ids=[words for _, words in WRONG])
def test_a_trace_that_contradicts_itself_is_refused(
    trace: Trace, tmp_path: Path, fields: dict[str, object], words: str
) -> None:
    file = tmp_path / "t"
    save(trace, file)
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"]["experts"] = json.dumps(json.loads(header["__metadata__"]["experts"]) | fields)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(TenfoldError) as refused:
        load(file)
    assert words in str(refused.value) and str(file) in str(refused.value)


def test_a_token_that_chose_an_expert_twice_is_refused(trace: Trace, tmp_path: Path) -> None:
    twice = trace.experts_TLK.copy()
    twice[7, 1] = 3
    save(Trace(trace.header, twice, trace.lookahead_TLK), tmp_path / "t")
    with pytest.raises(TenfoldError, match="chose an expert twice"):
        load(tmp_path / "t")


def test_the_hottest_come_first(trace: Trace, tmp_path: Path) -> None:
    save(trace, tmp_path / "t")
    config = ModelConfig.parse(SHAPE | {"mlp_only_layers": [0]}, "test")
    order = hottest(tmp_path / "t", config)
    uses: Counter[tuple[int, int]] = Counter()
    for choices in trace.experts_TLK.tolist():
        for layer, experts in zip((1, 2), choices, strict=True):
            uses.update((layer, expert) for expert in experts)
    assert set(order) == set(uses)
    assert [uses[key] for key in order] == sorted(uses.values(), reverse=True)
    other = ModelConfig.parse(SHAPE, "test")
    with pytest.raises(TenfoldError, match="of another model: its layers"):
        hottest(tmp_path / "t", other)


# The verb


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("traced")
    tokenizer = Tokenizer(train_bpe(iter(["the cat sat on the mat, 12 times"] * 9), 290))
    model = build(SHAPE | {"vocab_size": tokenizer.vocab_size})
    save_model(model, root / "model", tokenizer)
    dense = {"num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0}
    save_model(build(SHAPE | dense | {"vocab_size": tokenizer.vocab_size}), root / "dense", tokenizer)
    pack(root / "model", root / "packed", Packing(experts="q8", rest="bf16"))
    (root / "prose.txt").write_text("the cat sat on the mat " * 40)
    (root / "numbers.txt").write_text("1 2 12 " * 9)
    return root


@pytest.mark.parametrize("kind", ["model", "packed"])
def test_a_trace_is_recorded_and_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    out, picture = tmp_path / "trace.safetensors", tmp_path / "p.svg"
    texts = [str(folder / name) for name in ("prose.txt", "numbers.txt")]
    data = [part for text in texts for part in ("--data", text)]
    arguments = [*data, "--tokens", 100, "-o", out, "--plot", picture]
    status, table, err = run(capsys, "trace", folder / kind, *arguments)
    assert status == 0, err
    assert "of 6 experts in 3 layers" in " ".join(table.split()) and "optimum" in table
    assert all(text in picture.read_text() for text in texts)
    status, printed, _ = run(capsys, "trace", out, "--json")
    found = json.loads(printed)
    assert status == 0
    assert 50 < found["tokens"] <= 100 and list(found["load"]) == texts
    for row in found["hit_rate"]:
        assert row["bytes"] == row["slots"] * found["expert_bytes"]
        assert max(row["lru"], row["fitted"], row["lfu"]) <= row["belady"] <= 1
    rates = [row["belady"] for row in found["hit_rate"]]
    assert rates == sorted(rates)


@needs_kernels
def test_a_trace_warms_the_store_of_its_model(folder: Path, tmp_path: Path) -> None:
    """Recorded while experts are streamed, as while they are resident; then the hottest are read first."""
    resident, streamed = load_packed(folder / "packed"), read_packed(folder / "packed", 5)
    texts = {"a": windows(build(SHAPE), 40)}
    save(trace_of(resident, "t", texts), tmp_path / "a")
    save(trace_of(streamed, "t", texts), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    order, store = hottest(tmp_path / "a", resident.config), read_packed(folder / "packed", 5).store
    assert store is not None
    store.warm(order)
    assert store.meter().bytes_read == 5 * store.record_bytes


def test_a_name_is_neither_formula_nor_always_text(folder: Path, tmp_path: Path) -> None:
    files = [tmp_path / "a$_$b.txt", tmp_path / "bad\udcff.txt"]
    for file in files:
        file.write_text("the cat sat on the mat")
    found = trace_verb(str(folder / "model"), [*map(str, files)], 20, tmp_path / "t", tmp_path / "p.svg")
    assert [Path(kind).name for kind in found["load"]] == ["a$_$b.txt", "bad?.txt"]
    assert "a$_$b.txt" in (tmp_path / "p.svg").read_text()


def test_a_text_named_twice_is_read_once(folder: Path, tmp_path: Path) -> None:
    texts = [str(folder / "prose.txt")] * 2
    assert trace_verb(str(folder / "model"), texts, 50, tmp_path / "t", None)["tokens"] == 50


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "FOLDER/prose.txt", "-o", "/nowhere/t"], "/nowhere/t: cannot be written"),
        (["--data", "FOLDER/prose.txt", "-o", "OUT", "--plot", "/nowhere/p.svg"], "/nowhere/p.svg: cannot"),
        (["--data", "FOLDER/nowhere.txt", "-o", "OUT"], "nowhere.txt: no such file"),
    ],
    ids=["out", "plot", "data"],
)
def test_what_can_be_refused_is_refused_before_a_weight_is_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    shutil.copytree(folder / "model", tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no weights")
    given_ = [a.replace("FOLDER", str(folder)).replace("OUT", str(tmp_path / "t")) for a in arguments]
    status, _, err = run(capsys, "trace", tmp_path / "broken", *given_)
    assert status == 2 and words in err


def test_a_picture_does_not_replace_its_trace(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both, prose = tmp_path / "t.svg", folder / "prose.txt"
    status, _, err = run(capsys, "trace", folder / "model", "--data", prose, "-o", both, "--plot", both)
    assert status == 2 and "the trace's own file" in err
    assert run(capsys, "trace", folder / "model", "--data", prose, "-o", both)[0] == 0
    status, _, err = run(capsys, "trace", both, "--plot", both)
    assert status == 2 and "the trace's own file" in err and load(both)


BAD = [
    (["FOLDER/nothing"], "nothing: no such trace"),
    (["FOLDER/dense", "--data", "FOLDER/prose.txt", "-o", "OUT"], "dense: there are no experts"),
    (["FOLDER/model", "--data", "FOLDER/nowhere.txt", "-o", "OUT"], "nowhere.txt: no such file"),
    (["FOLDER/model", "--data", "FOLDER/prose.txt"], "--data and --out go together"),
    (["FOLDER/model", "-o", "OUT"], "--data and --out go together"),
    (["FOLDER/model"], "is a folder"),
    (["FOLDER/prose.txt"], "not a whole safetensors file"),
    (["FOLDER/model/model.safetensors"], "not a trace"),
    (["FOLDER/model", "--data", "FOLDER/prose.txt", "-o", "FOLDER/prose.txt"], "is there already"),
    (["FOLDER/model", "--data", "FOLDER/prose.txt", "-o", "OUT", "--plot", "p.png"], ".svg"),
    (["FOLDER/model", "--data", "FOLDER/prose.txt", "-o", "OUT", "--tokens", "0"], "tokens"),
    (["FOLDER/model", "--data", "FOLDER/prose.txt", "-o", "/nowhere/t"], "/nowhere/t: cannot be written"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_input_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    out = tmp_path / "t"
    given_ = [a.replace("FOLDER", str(folder)).replace("OUT", str(out)) for a in arguments]
    status, _, err = run(capsys, "trace", *given_)
    assert status == 2 and words in err and err.count("\n") == 1
    assert not out.exists()
