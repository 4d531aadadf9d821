"""Speculation with a model's own multi-token prediction, or by looking up: always the same tokens."""

from pathlib import Path

import pytest
import torch
from random_families import random_fields
from served_model import write_served_model
from test_packed_engine import build

from tenfold import LLM, SamplingParams
from tenfold.checkpoint import save_model
from tenfold.engine.batch import Chunk, Pending
from tenfold.engine.generation import load_generation
from tenfold.engine.request import Piece, Request
from tenfold.engine.scheduler import Scheduler
from tenfold.engine.speculation import Speculation
from tenfold.engine.torch_batch import TorchBatchRunner
from tenfold.tokenizer import load_tokenizer

MTP = {"num_nextn_predict_layers": 1}


@pytest.mark.parametrize("seed", range(4))
@torch.inference_mode()
def test_drafts_are_what_the_module_says_of_the_whole_text(seed: int) -> None:
    model = build(random_fields("deepseek_v3", seed) | MTP, seed)
    texts = [torch.randint(model.config.vocab_size, (length,)).tolist() for length in (21, 9)]
    runner = TorchBatchRunner(model, 8, 4 * 4, 64)
    tables, pending = [[5, 2], [7]], []
    for text, table in zip(texts, tables, strict=True):
        states = []
        for start, end in ((0, 5), (5, len(text) - 1)):
            passed = runner.begin([Chunk(table, start, text[start:end], 1)])
            passed.advance()
            assert passed.states_TD is not None
            states.append(passed.states_TD)
        pending.append(Pending(table, 0, torch.cat(states), text[1:]))
    assert runner.drafter is not None
    # One of them in two steps: what was seen before is in the drafter's cache.
    first, second = pending
    runner.drafter.draft([first._replace(states_SD=first.states_SD[:6], next_ids=first.next_ids[:6])])
    rest = first._replace(start=6, states_SD=first.states_SD[6:], next_ids=first.next_ids[6:])
    drafts = runner.drafter.draft([rest, second])
    for text, draft in zip(texts, drafts, strict=True):
        ids = torch.tensor([text])
        ahead, _ = model.states_ahead(model.hidden_states(ids)[0], ids)
        assert draft == int(model.logits(ahead[0, -1]).argmax())


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guessing at every step, whether it pays or not."""
    monkeypatch.setattr(Speculation, "wanted", lambda self, batch: 3)


@pytest.mark.usefixtures("always")
def test_tokens_are_the_same_with_and_without(tmp_path: Path) -> None:
    served = write_served_model(tmp_path)
    model = build(random_fields("deepseek_v3", 1) | MTP | {"vocab_size": 2048, "eos_token_id": 2047})
    save_model(model, tmp_path / "torch", load_tokenizer(served))
    for path in (served, tmp_path / "torch"):
        llm = LLM(path, context=60)
        prompts = ["once upon a time", "na na na na na na na", "x"]
        params = [SamplingParams(max_tokens=9 + n, temperature=n % 2, seed=n) for n in range(3)]
        results = llm.generate(prompts, params)
        assert path == served or sum(result.meter.drafted for result in results) > 0
        for prompt, each, result in zip(prompts, params, results, strict=True):
            assert result.tokens == load_generation(path, prompt, each).finish().tokens


@pytest.mark.usefixtures("always")
def test_a_guess_that_is_right_saves_a_step(tmp_path: Path) -> None:
    """A module that copies the main model's own certainty: all tokens lead to the same one."""
    model = build(random_fields("deepseek_v3", 1) | MTP | {"vocab_size": 2048, "eos_token_id": 2047})
    with torch.no_grad():
        for norm in (model.norm, model.mtp[0].norm):
            norm.weight.zero_()
        model.lm_head.weight.zero_()
    save_model(model, tmp_path / "torch", load_tokenizer(write_served_model(tmp_path)))
    llm = LLM(tmp_path / "torch", context=60)
    ((result,),) = llm.run([Request([1, 2, 3], SamplingParams(max_tokens=20, temperature=0), logprobs=0)])
    assert result.tokens == [0] * 20 and len(result.logprobs) == 20
    assert result.meter.accepted >= 9 and result.meter.decode.tokens == 19


@pytest.mark.usefixtures("always")
def test_a_text_that_resumes_from_the_cache_alone(tmp_path: Path) -> None:
    """All but its last token is in kept blocks: nothing of it is there for the drafter to see."""
    model = build(random_fields("deepseek_v3", 1) | MTP | {"vocab_size": 2048, "eos_token_id": 2047})
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
