"""Packed models, many sequences in one pass: to the bit what each of them gives alone."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_families import FAMILIES, random_fields
from test_packed_engine import DENSE, SHAPE, build, errors
from torch import Tensor

from tenfold import compiled
from tenfold.config import ModelConfig
from tenfold.engine.batch import Chunk
from tenfold.engine.packed import PackedRunner
from tenfold.engine.packed_batch import BLOCK_SIZE, PackedBatchRunner
from tenfold.errors import TenfoldError
from tenfold.packed import PackedModel, packed_of

pytestmark = pytest.mark.skipif(not compiled.available(), reason="no compiled kernels in this installation")

CONTEXT, BLOCKS = 200, 24
MODELS = {
    "sparse": SHAPE,
    "windows": DENSE | {"sliding_window": 70, "attention_sinks": True},
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
    for start, end, few in ((0, 20, 0), (20, 23, 3), (23, 24, 1), (24, 27, 3)):
        passed = runner.begin(
            [Chunk([n], start, ids[start:end], few) for n, ids in enumerate(ids_BS.tolist())]
        )
        while not passed.advance(1):
            pass
        got.append(passed.logits().view(3, few, model.config.vocab_size))
    assert errors(torch.cat(got, dim=1), wanted).median() < 0.02


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (Chunk([0], 0, [97], 1), "token id 97 is none"),
        (Chunk([0], 0, [-1], 1), "token id -1 is none"),
        (Chunk([0], 60, [1] * 5, 1), "65 positions are more than the 64"),
        (Chunk(range(9), 0, [1] * 513, 1), "513 tokens are more than the 512"),
        (Chunk([0], 0, [], 0), "needs chunks"),
    ],
)
def test_what_the_kernels_would_trust_is_refused(chunk: Chunk, message: str) -> None:
    runner = runner_of(packed_of(build(DENSE), "q8", "q8"))
    with pytest.raises(TenfoldError, match=message):
        runner.begin([chunk])


def test_expert_choice_is_refused() -> None:
    config = ModelConfig.parse(SHAPE | {"router": "expert_choice"}, "test")
    with pytest.raises(TenfoldError, match="cannot generate"):
        PackedBatchRunner(PackedModel(config, {}), 1, 1, 1)
