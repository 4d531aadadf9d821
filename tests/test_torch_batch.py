"""Many sequences at once through torch's model: as it computes each alone and whole."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_families import FAMILIES, random_fields
from test_parity_transformers import build
from torch import Tensor

from tenfold.engine.batch import Chunk
from tenfold.engine.torch_batch import TorchBatchRunner
from tenfold.errors import TenfoldError
from tenfold.model.transformer import Transformer

BLOCK, BLOCKS, ROOM = 4, 64, 400


class Sequence:
    """A text that a runner reads piece by piece."""

    def __init__(self, model: Transformer, length: int, seed: int, blocks: list[int]):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(model.config.vocab_size, (length,), generator=generator)
        with torch.inference_mode():
            self.logits, aux = model(self.ids[None], return_aux=True)
        self.logits, self.experts = self.logits[0], [layer.expert_ids_TK for layer in aux]
        self.blocks, self.read = blocks, 0

    def chunk(self, start: int, size: int, wanted: int) -> Chunk:
        ids = self.ids[start : start + size].tolist()
        self.read = start + len(ids)
        return Chunk(self.blocks, start, ids, min(wanted, len(ids)))


def sequences(model: Transformer, lengths: list[int], seed: int) -> list[Sequence]:
    """Each with blocks of its own, in no order."""
    free = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        Sequence(model, length, seed + n, [free.pop() for _ in range(-(-length // BLOCK))])
        for n, length in enumerate(lengths)
    ]


def check_pass(runner: TorchBatchRunner, chunks: list[tuple[Sequence, Chunk]], layers: int | None) -> None:
    passed = runner.begin([chunk for _, chunk in chunks])
    while not passed.advance(layers):
        pass
    wanted = [text.logits[c.start :][: len(c.ids)][len(c.ids) - c.wanted :] for text, c in chunks]
    close(passed.logits(), torch.cat(wanted))
    sparse = runner.config.sparse_layers
    assert len(passed.routes) == len(sparse)
    for index, (layer, got) in enumerate(zip(sparse, passed.routes, strict=True)):
        last = layer == runner.config.num_hidden_layers - 1
        expected = [
            text.experts[index][c.start :][: len(c.ids)][len(c.ids) - c.wanted if last else 0 :]
            for text, c in chunks
        ]
        assert got.dtype == torch.int32 and got.tolist() == torch.cat(expected).tolist()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def passes(texts: list[Sequence], draw: st.DataObject) -> Iterator[list[tuple[Sequence, Chunk]]]:
    """Pieces of texts until all are read: long, short and single; some go back a little, as after a
    guess that was wrong."""
    while left := [text for text in texts if text.read < len(text.ids)]:
        chosen = draw.draw(st.lists(st.sampled_from(left), min_size=1, unique_by=id))
        size, back = st.sampled_from([1, 1, 2, 3, 7, 40]), st.sampled_from([0, 0, 0, 1, 5])
        chunks = []
        for text in chosen:
            start = max(0, text.read - draw.draw(back))
            chunks.append((text, text.chunk(start, draw.draw(size), draw.draw(st.integers(0, 4)))))
        yield chunks


def new_runner(model: Transformer) -> TorchBatchRunner:
    """Its memory is full of NaN: nothing may be read that was not written."""
    torch.use_deterministic_algorithms(True)
    try:
        return TorchBatchRunner(model, BLOCKS, BLOCK, ROOM)
    finally:
        torch.use_deterministic_algorithms(False)


# The same examples each time: where two experts score alike, rounding may choose the other.
@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=10, derandomize=True)
@given(
    st.integers(0, 5),
    st.lists(st.integers(1, 45), min_size=1, max_size=5),
    st.sampled_from([None, 1, 2]),
    st.data(),
)
def test_however_texts_are_cut_and_mixed(
    family: str, seed: int, lengths: list[int], layers: int | None, draw: st.DataObject
) -> None:
    model = build(random_fields(family, seed), seed)
    runner = new_runner(model)
    for chunks in passes(sequences(model, lengths, seed), draw):
        check_pass(runner, chunks, layers)


SPARSE = {
    "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_experts": 6, "num_experts_per_tok": 1,
    "moe_intermediate_size": 24, "initializer_range": 0.3,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 6,
    "num_key_value_heads": 4, "qk_norm": "none",
}  # fmt: skip


@pytest.mark.parametrize("fields", [{"router": "switch"}, {"rope_interleave": True}, LATENT])
@pytest.mark.parametrize("window", [None, 1, 6])
def test_options_of_no_published_family(fields: dict[str, object], window: int | None) -> None:
    """A prompt in two pieces while others are decoded, guesses of one size among them."""
    model = build(SPARSE | fields | {"sliding_window": window})
    runner, texts = new_runner(model), sequences(model, [40, 9, 12, 7, 1], 0)
    for sizes in [(20, 5, 8, 4, 1), (20, 1, 1, 3), (0, 3, 3)]:
        read = [(t, size) for t, size in zip(texts, sizes, strict=False) if size]
        check_pass(runner, [(text, text.chunk(text.read, size, 2)) for text, size in read], None)


def test_passes_overtake_each_other() -> None:
    model = build(SPARSE | {"num_hidden_layers": 4})
    runner, (prompt, decoded) = new_runner(model), sequences(model, [30, 12], 0)
    slow = runner.begin([prompt.chunk(0, 30, 1)])
    for size in (8, 1, 1, 2):
        assert slow.advance(1) == (size == 2)
        check_pass(runner, [(decoded, decoded.chunk(decoded.read, size, 1))], None)
    close(slow.logits(), prompt.logits[-1:])


def test_in_bf16() -> None:
    model = build(SPARSE | {"num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0})
    (text,) = sequences(model, [20], 0)
    runner = new_runner(model.bfloat16())
    for size in (18, 2):
        passed = runner.begin([text.chunk(text.read, size, 2)])
        assert passed.advance()
    got = passed.logits()
    assert got.dtype == torch.float32 and (got - text.logits[-2:]).norm() < 0.05 * text.logits[-2:].norm()


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([Chunk([0], 0, [3, 97], 1)], "token id 97 is none of the model's, which are 0 to 96"),
        ([Chunk([0], 0, [3], 1), Chunk([1], 0, [-1], 1)], "token id -1 is none"),
        ([Chunk([0, 1], 6, [3, 3, 3], 1)], "9 positions are more than the 8 there is room for"),
        ([Chunk(list(range(BLOCKS)), 0, [3] * 401, 1)], "401 tokens are more than the 400 of a pass"),
        ([Chunk([0], 0, [3], 1), Chunk([1], 0, [], 0)], "1 token or more"),
        ([], "1 token or more"),
    ],
)
def test_what_is_no_pass_is_refused(chunks: list[Chunk], message: str) -> None:
    with pytest.raises(TenfoldError, match=message):
        new_runner(build(SPARSE)).begin(chunks)


def test_expert_choice_is_refused() -> None:
    with pytest.raises(TenfoldError, match="expert_choice cannot generate"):
        new_runner(build(SPARSE | {"router": "expert_choice"}))
