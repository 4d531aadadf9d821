"""Speculation with a model's own multi-token prediction, or by looking up: always the same tokens."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from random_families import random_fields
from served_model import write_served_model
from test_packed_engine import build

from tenfold import LLM, SamplingParams
from tenfold.checkpoint import save_model
from tenfold.engine.batch import Chunk, Outcome
from tenfold.engine.generation import load_generation
from tenfold.engine.request import Piece, Request
from tenfold.engine.scheduler import Scheduler
from tenfold.engine.speculation import LookUp, Speculation
from tenfold.engine.torch_batch import TorchBatchRunner
from tenfold.model.transformer import Transformer
from tenfold.tokenizer import load_tokenizer

MTP = {"num_nextn_predict_layers": 1}
FOR_TOKENIZER = MTP | {"vocab_size": 2048, "eos_token_id": 2047}
"""That of `write_served_model`."""


# The same examples each time: where two tokens are as likely, rounding may choose the other.
@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.integers(0, 5), st.lists(st.integers(2, 24), min_size=1, max_size=4), st.data())
def test_guesses_are_what_the_module_says_of_the_whole_text(
    seed: int, lengths: list[int], draw: st.DataObject
) -> None:
    """However it is cut, whatever wrong guesses were tried before, and whether or not one was wanted."""
    model = build(random_fields("deepseek_v3", seed) | MTP, seed)
    runner = TorchBatchRunner(model, 64, 4, 400)
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    tables, read = [list(range(n, 64, 8)) for n in range(len(texts))], [0] * len(texts)
    with torch.inference_mode():
        ids = [torch.tensor([text]) for text in texts]
        ahead = [model.states_ahead(model.hidden_states(text)[0], text)[0] for text in ids]
        expected = [model.logits(states).argmax(-1)[0].tolist() for states in ahead]
    while left := [n for n, text in enumerate(texts) if read[n] < len(text) - 1]:
        chunks, outcomes, right = [], [], []
        for n in draw.draw(st.lists(st.sampled_from(left), min_size=1, unique=True)):
            given_up = draw.draw(st.sampled_from([False, False, False, True]))
            kept = 0 if given_up else draw.draw(st.integers(1, len(texts[n]) - 1 - read[n]))
            wrong = draw.draw(st.lists(st.integers(0, 60), min_size=not kept, max_size=3))
            chunks.append(Chunk(tables[n], read[n], [*texts[n][read[n] : read[n] + kept], *wrong], 1))
            read[n] += kept
            outcomes.append(Outcome(kept, texts[n][read[n]], draw.draw(st.booleans())))
            right.append(expected[n][read[n] - 1] if kept and outcomes[-1].guess else None)
        passed = runner.begin(chunks)
        passed.advance()
        assert passed.draft(outcomes) == right


@pytest.mark.parametrize("seed", [1, 3])
def test_a_model_with_the_module_says_what_it_says_without(seed: int) -> None:
    model = build(random_fields("deepseek_v3", seed) | MTP, seed)
    chunks = [Chunk([0, 1], 0, [1, 2, 3, 4, 5], 2), Chunk([2], 0, [6, 7], 0), Chunk([3], 0, [8], 1)]
    seen = TorchBatchRunner(model, 8, 4, 40).begin(chunks)
    model.mtp = torch.nn.ModuleList()
    plain = TorchBatchRunner(model, 8, 4, 40).begin(chunks)
    assert plain.advance() and seen.advance()
    torch.testing.assert_close(seen.logits(), plain.logits(), atol=1e-5, rtol=1e-5)
    assert [routes.tolist() for routes in seen.routes] == [routes.tolist() for routes in plain.routes]
    assert plain.draft([Outcome(1, 2, True)] * 3) == [None] * 3


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guessing at every step, whether it pays or not."""
    monkeypatch.setattr(Speculation, "wanted", lambda *_: 3)


@pytest.fixture
def no_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LookUp, "drafts", lambda *_: [])


@pytest.mark.usefixtures("always")
def test_tokens_are_the_same_with_and_without(tmp_path: Path) -> None:
    served = write_served_model(tmp_path)
    model = build(random_fields("deepseek_v3", 1) | FOR_TOKENIZER)
    save_model(model, tmp_path / "torch", load_tokenizer(served))
    for path in (served, tmp_path / "torch"):
        llm = LLM(path, context=60)
        prompts = ["once upon a time", "na na na na na na na", "x"]
        params = [SamplingParams(max_tokens=9 + n, temperature=n % 2, seed=n) for n in range(3)]
        results = llm.generate(prompts, params)
        assert path == served or sum(result.meter.drafted for result in results) > 0
        for prompt, each, result in zip(prompts, params, results, strict=True):
            assert result.tokens == load_generation(path, prompt, each).finish().tokens


CYCLE = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


def trained() -> Transformer:
    """It has learnt one endless text by heart, and so has its module."""
    torch.manual_seed(0)
    model = build(random_fields("deepseek_v3", 3) | FOR_TOKENIZER | {"initializer_range": 0.1})
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    text = torch.tensor(CYCLE * 4)
    for _ in range(60):
        ids = text[torch.randint(len(CYCLE), (8, 1)) + torch.arange(26)]
        hidden, _ = model.hidden_states(ids[:, :-1])
        ahead, _ = model.states_ahead(hidden, ids[:, :-1])
        loss = F.cross_entropy(model.logits(hidden).mT, ids[:, 1:])
        (loss + F.cross_entropy(model.logits(ahead).mT, ids[:, 2:])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.usefixtures("always", "no_look_up")
def test_guesses_that_are_right_save_steps(tmp_path: Path) -> None:
    save_model(trained(), tmp_path / "torch", load_tokenizer(write_served_model(tmp_path)))
    llm = LLM(tmp_path / "torch", context=60)
    params = SamplingParams(max_tokens=30, temperature=0)
    results = [texts[0] for texts in llm.run([Request(CYCLE[n : n + 5], params) for n in range(3)])]
    for n, result in enumerate(results):
        assert result.tokens == (CYCLE * 4)[n + 5 : n + 35]
        assert result.meter.accepted >= 13 and result.meter.drafted <= 16


@pytest.mark.usefixtures("always")
def test_a_text_that_resumes_from_the_cache_alone(tmp_path: Path) -> None:
    """All but its last token is in kept blocks: nothing of it is there for the drafter to see."""
    model = build(random_fields("deepseek_v3", 1) | FOR_TOKENIZER)
    tokenizer = load_tokenizer(write_served_model(tmp_path))
    request = Request([1, 2, 3], SamplingParams(max_tokens=20, temperature=0))

    def tokens(preempt: bool) -> list[int]:
        scheduler, found = Scheduler(TorchBatchRunner(model, 16, 4, 64), tokenizer, 60, 2), []
        scheduler.add(scheduler.prepare(request))
        while scheduler.busy:
            pieces = [piece for _, piece in scheduler.step() if isinstance(piece, Piece)]
            found += [token.id for piece in pieces for token in piece.tokens]
            for seq in scheduler.active.copy():
                if preempt and seq.decoding and len(seq.ids) % 4 == 1:
                    scheduler._preempt(seq)
                    preempt = False
        assert not preempt
        return found

    assert tokens(preempt=True) == tokens(preempt=False)
