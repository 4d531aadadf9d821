"""Packed models, many sequences in one pass: to the bit what each of them gives alone."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_families import FAMILIES, random_fields
from test_expert_store import write_pack
from test_packed_engine import DENSE, SHAPE, build, damaged, errors
from torch import Tensor

from tenfold import compiled
from tenfold.config import ModelConfig
from tenfold.engine.batch import Chunk
from tenfold.engine.packed import PackedRunner
from tenfold.engine.packed_batch import BLOCK_SIZE, PackedBatchRunner
from tenfold.errors import TenfoldError
from tenfold.packed import PackedModel, load_packed, packed_of, read_packed

pytestmark = pytest.mark.skipif(not compiled.available(), reason="no compiled kernels in this installation")

CONTEXT, BLOCKS = 200, 24
LATENT = {
    "kv_lora_rank": 40, "q_lora_rank": 20, "qk_nope_head_dim": 9, "qk_rope_head_dim": 6, "v_head_dim": 17,
    "head_dim": 6, "num_key_value_heads": 4, "rope_interleave": True, "qk_norm": "none",
}  # fmt: skip
MODELS = {
    "sparse": SHAPE,
    "windows": DENSE | {"sliding_window": 70, "attention_sinks": True},
    "latent": SHAPE | LATENT,
}


def runner_of(model: PackedModel) -> PackedBatchRunner:
    return PackedBatchRunner(model, BLOCKS, 512, CONTEXT)


def alone(model: PackedModel, ids: list[int]) -> Tensor:
    """Logits (S, V) after each token, which a runner of its own takes one by one."""
    runner = PackedRunner(model, 1, CONTEXT)
    return torch.cat([runner.forward(torch.tensor([[token]])) for token in ids])


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> PackedModel:
    return packed_of(build(MODELS[request.param]), "q4", "q8")


@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_neither_company_nor_cuts_nor_blocks_change_a_bit(model: PackedModel, seed: int) -> None:
    dice, runner = random.Random(seed), runner_of(model)
    texts = [dice.choices(range(97), k=dice.randint(1, CONTEXT)) for _ in range(dice.randint(1, 5))]
    free = dice.sample(range(BLOCKS), BLOCKS)
    tables = [[free.pop() for _ in range(-(-len(text) // BLOCK_SIZE))] for text in texts]
    done, last = [0] * len(texts), {}
    while left := [n for n, text in enumerate(texts) if done[n] < len(text)]:
        chosen = dice.sample(left, dice.randint(1, len(left)))
        sizes = [dice.randint(1, min(100, len(texts[n]) - done[n])) for n in chosen]
        chunks = [
            Chunk(tables[n], done[n], texts[n][done[n] : done[n] + size], 1)
            for n, size in zip(chosen, sizes, strict=True)
        ]
        passed = runner.begin(chunks)
        while not passed.advance(dice.randint(1, 2)):
            pass
        for n, size, logits_V in zip(chosen, sizes, passed.logits(), strict=True):
            done[n] += size
            last[n] = logits_V
    for n, text in enumerate(texts):
        assert torch.equal(last[n], PackedRunner(model, 1, CONTEXT).forward(torch.tensor([text]))[0])


def test_logits_of_many_tokens_and_drafts_that_are_taken_back(model: PackedModel) -> None:
    ids = torch.randint(97, (130,), generator=torch.Generator().manual_seed(1)).tolist()
    wanted = alone(model, ids)
    runner = runner_of(model)
    first = runner.begin([Chunk([5, 3, 9], 0, ids[:100], 7)])
    first.advance()
    assert torch.equal(first.logits(), wanted[93:100])
    for _ in range(2):  # what is wrong is written over
        drafted = runner.begin([Chunk([5, 3, 9], 100, [ids[100], 1, 2, 3], 4)])
        drafted.advance()
        assert torch.equal(drafted.logits()[0], wanted[100])
    rest = runner.begin([Chunk([5, 3, 9], 101, ids[101:], 29)])
    rest.advance()
    assert torch.equal(rest.logits(), wanted[101:])


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_that_share_out_the_heads_change_no_bit(model: PackedModel, threads: int) -> None:
    ids = torch.randint(97, (90,)).tolist()
    before = compiled.module().threads()
    compiled.module().set_threads(1)
    try:
        wanted = alone(model, ids)
        compiled.module().set_threads(threads)
        assert torch.equal(alone(model, ids), wanted)
    finally:
        compiled.module().set_threads(before)


def test_two_passes_under_way_do_not_disturb_each_other(model: PackedModel) -> None:
    long, short = (torch.randint(97, (size,)).tolist() for size in (150, 40))
    runner = runner_of(model)
    one = runner.begin([Chunk([0, 1, 2], 0, long, 1)])
    one.advance(1)
    two = runner.begin([Chunk([3], 0, short, 1)])
    assert two.advance() and one.advance()
    assert torch.equal(one.logits()[0], alone(model, long)[-1])
    assert torch.equal(two.logits()[0], alone(model, short)[-1])


def test_routes_are_what_each_token_chose() -> None:
    model = packed_of(build(SHAPE), "bf16", "bf16")
    runner = runner_of(model)
    ids = torch.randint(97, (30,)).tolist()
    passed = runner.begin([Chunk([0], 0, ids[:20], 0), Chunk([1], 0, ids, 2)])
    assert len(passed.routes) == 0
    passed.advance(1)
    assert len(passed.routes) == 0  # a layer chooses when the next one begins
    passed.advance()
    first, last = passed.routes
    assert first.shape == (50, 2) and last.shape == (2, 2)
    again = runner.begin([Chunk([2], 0, ids, 30)])
    again.advance()
    assert torch.equal(again.routes[0], first[20:]) and torch.equal(again.routes[1][28:], last)
    assert torch.equal(first[:20], first[20:40])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [0, 3])
@torch.inference_mode()
def test_every_family_as_torch_computes_it(family: str, seed: int) -> None:
    model = build(random_fields(family, seed), seed)
    ids_BS = torch.randint(0, model.config.vocab_size, (3, 27))
    wanted = model(ids_BS)[:, 20:]
    runner = PackedBatchRunner(packed_of(model, "bf16", "bf16"), 3, 64, 64)
    got = []
    for start, end, few in ((0, 18, 0), (18, 23, 3), (23, 24, 1), (24, 27, 3)):
        passed = runner.begin(
            [Chunk([n], start, ids[start:end], few) for n, ids in enumerate(ids_BS.tolist())]
        )
        while not passed.advance(1):
            pass
        got.append(passed.logits().view(3, few, model.config.vocab_size))
    assert errors(torch.cat(got, dim=1), wanted).median() < 0.02


@pytest.mark.parametrize("isa", compiled.module().isas() if compiled.available() else [])
@pytest.mark.parametrize("shared", [1, 3, 8])
def test_tiles_of_any_size_give_the_same(isa: str, shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in bf16, of attention and of weights, of every instruction set."""
    monkeypatch.setenv("TENFOLD_ISA", isa)
    heads = {"num_attention_heads": 2 * shared, "num_key_value_heads": 2}
    model = packed_of(build(SHAPE | heads), "bf16", "bf16")
    ids, runner = torch.randint(97, (90,)).tolist(), runner_of(model)
    wanted, start = alone(model, ids), 0
    for size in (1, 2, 5, 9, 16, 17, 40):
        passed = runner.begin([Chunk([7, 2], start, ids[start : start + size], size)])
        passed.advance()
        assert torch.equal(passed.logits(), wanted[start : start + size])
        start += size


def test_a_prefix_is_shared(model: PackedModel) -> None:
    """Two texts that begin alike read the same blocks, and go on in others."""
    runner, beginning = runner_of(model), torch.randint(97, (64,)).tolist()
    runner.begin([Chunk([4], 0, beginning, 0)]).advance()
    ends = [torch.randint(97, (30,)).tolist() for _ in range(2)]
    both = runner.begin([Chunk([4, 9 + n], 64, end, 1) for n, end in enumerate(ends)])
    both.advance()
    for end, logits_V in zip(ends, both.logits(), strict=True):
        assert torch.equal(alone(model, beginning + end)[-1], logits_V)


@pytest.mark.parametrize("slots", [2, 7, 1000])
def test_streamed_experts(slots: int, tmp_path: Path) -> None:
    """Passes that take turns at one store, and in each of its steps a batch asks for an expert once."""
    path = write_pack(tmp_path, SHAPE)
    resident, streamed = load_packed(path), read_packed(path, slots)
    runner, texts = runner_of(streamed), [torch.randint(97, (size,)).tolist() for size in (60, 20, 9)]
    wanted = [PackedRunner(resident, 1, CONTEXT).forward(torch.tensor([text])) for text in texts]
    slow = runner.begin([Chunk([0], 0, texts[0], 1)])
    slow.advance(1)
    runner.begin([Chunk([n], 0, texts[n][:-1], 0) for n in (1, 2)]).advance()
    assert streamed.store
    before = streamed.store.meter()
    quick = runner.begin([Chunk([n], len(texts[n]) - 1, texts[n][-1:], 1) for n in (1, 2)])
    quick.advance()
    after = streamed.store.meter()
    assert slow.advance() and torch.equal(torch.cat([slow.logits(), quick.logits()]), torch.cat(wanted))
    asked = after.hits + after.misses - before.hits - before.misses
    assert asked == sum(len(routes.unique()) for routes in quick.routes)


def test_what_another_left_in_a_block_is_cleared() -> None:
    runner = runner_of(damaged())
    runner.begin([Chunk([1], 0, [5] * 20, 0)]).advance()
    runner.clear([1])
    passed = runner.begin([Chunk([1], 0, [0] * 3, 1)])
    passed.advance()
    assert passed.logits().isfinite().all()


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (Chunk([0], 0, [97], 1), "token id 97 is none"),
        (Chunk([0], 0, [-1], 1), "token id -1 is none"),
        (Chunk([0], 60, [1] * 5, 1), "65 positions are more than the 64"),
        (Chunk(range(9), 199, [1] * 2, 1), "201 positions are more than the context of 200"),
        (Chunk(range(9), 0, [1] * 513, 1), "513 tokens are more than the 512"),
        (Chunk([0], 0, [], 0), "needs chunks"),
        (Chunk([0], 0, [1], 2), "2 of 1 tokens cannot be wanted"),
        (Chunk([0], 0, [1], -1), "-1 of 1 tokens cannot be wanted"),
    ],
)
def test_what_the_kernels_would_trust_is_refused(chunk: Chunk, message: str) -> None:
    runner = runner_of(packed_of(build(DENSE), "q8", "q8"))
    with pytest.raises(TenfoldError, match=message):
        runner.begin([chunk])


@pytest.mark.parametrize("blocks", [[-1], [9], []])
def test_blocks_that_the_cache_does_not_have_are_refused(blocks: list[int]) -> None:
    with pytest.raises(IndexError, match="none of the cache's"):
        compiled.module().Chunks([Chunk(blocks, 0, [1], 1)], 9)


def test_expert_choice_is_refused() -> None:
    config = ModelConfig.parse(SHAPE | {"router": "expert_choice"}, "test")
    with pytest.raises(TenfoldError, match="cannot generate"):
        PackedBatchRunner(PackedModel(config, {}), 1, 1, 1)
