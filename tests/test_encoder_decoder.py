"""Generating with an encoder-decoder: spans filled through the command line, the cache, bad prompts."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from test_switch import build, generated_by_transformers
from tokenizers import models, pre_tokenizers, processors

from tenfold.checkpoint import save_model
from tenfold.cli import main
from tenfold.engine.encoder_decoder import GrowingKVCache, generate_tokens
from tenfold.engine.generation import Generation, load_generation
from tenfold.errors import TenfoldError
from tenfold.sampling import SamplingParams
from tenfold.tokenizer import Tokenizer, load_tokenizer

WORDS = ["<pad>", "</s>", "<unk>", "a", "walks", "into", "bar", "man", "the"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A model directory whose tokenizer ends every text with </s> and has sentinels, as T5's."""
    words = [*WORDS, "<extra_id_1>", "<extra_id_0>"]
    raw = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(["<pad>", "</s>", "<unk>", "<extra_id_1>", "<extra_id_0>"])
    raw.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    save_model(build(vocab_size=len(words), eos_token_id=1), tmp_path / "m", Tokenizer(raw))
    return tmp_path / "m"


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    monkeypatch.setattr("sys.argv", ["tenfold", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    return capsys.readouterr().out


def test_generate_fills_spans(
    saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "a <extra_id_0> walks into the <extra_id_1>"
    options = ("generate", saved, "--prompt", prompt, "--temperature", 0, "--max-tokens", 8)
    found = json.loads(run(capsys, monkeypatch, *options, "--json"))
    assert run(capsys, monkeypatch, *options) == found["text"] + "\n"
    tokenizer = load_tokenizer(saved)
    prompt_ids = tokenizer.encode(prompt)[: found["prompt_tokens"]]
    assert {9, 10} <= set(prompt_ids)
    theirs = generated_by_transformers(saved, torch.tensor([prompt_ids]), 8)
    assert found["tokens"] == [token for token in theirs[1:] if token != 1]
    assert found["text"] == tokenizer.decode(found["tokens"], skip_special_tokens=False)


def test_sentinels_are_text(saved: Path) -> None:
    """A model that says the sentinel shows it; the end of the text is not shown."""
    params = SamplingParams(temperature=0, max_tokens=5)
    generation = load_generation(saved, "a <extra_id_0>", params)
    head = generation.model.lm_head
    script = iter([10, 7, 9, 6, 1])
    head.forward = lambda _: F.one_hot(torch.tensor(next(script)), 11).float()
    assert "".join(generation) == "<extra_id_0> man <extra_id_1> bar"
    assert generation.summary()["finish_reason"] == "stop"


def test_max_tokens_end_the_text(saved: Path) -> None:
    model, endless = build(vocab_size=11), Tokenizer(load_tokenizer(saved).raw)
    generation = Generation(model, endless, "a", SamplingParams(max_tokens=150, seed=1)).finish()
    assert generation.finish_reason == "length" and len(generation.tokens) == 150


def test_the_cache_grows() -> None:
    empty = torch.empty(1, 2, 3, 4)
    cache, pieces = GrowingKVCache(empty, empty.clone()), [torch.randn(1, 2, n, 4) for n in (2, 2, 9, 1)]
    for piece in pieces:
        key, value = cache.update(piece, -piece)
    assert torch.equal(key, torch.cat(pieces, dim=2)) and torch.equal(value, -key)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(TenfoldError, match="the prompt is empty"):
        next(generate_tokens(build(), [], SamplingParams()))
