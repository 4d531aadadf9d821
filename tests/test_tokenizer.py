import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from tenfold.errors import TenfoldError
from tenfold.tokenizer import Tokenizer, load_tokenizer, train_bpe

TEXT = "the cat sat on the mat, and the dog sat on the log\n" * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(iter([TEXT]), 270).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def refusal(path: Path) -> str:
    with pytest.raises(TenfoldError) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def word_level(folder: Path, vocab: dict[str, int]) -> tokenizers.Tokenizer:
    raw = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=next(iter(vocab), "")))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.save(str(folder / "tokenizer.json"))
    return raw


def test_trained_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 270
    assert tokenizer.eos_token_id == 0
    assert tokenizer.encode("<|endoftext|>") == [0]
    assert len(tokenizer.encode(TEXT)) < len(TEXT) / 2


def test_too_little_text_gives_a_smaller_vocabulary() -> None:
    assert train_bpe(iter(["ab ab"]), 1000).get_vocab_size() == 259  # ab, and ab after a space
    assert train_bpe(iter([]), 1000).get_vocab_size() == 257


@pytest.mark.parametrize("vocab_size", [256, 0, -1])
def test_vocabulary_below_the_bytes_is_refused(vocab_size: int) -> None:
    with pytest.raises(TenfoldError, match=f"vocab_size {vocab_size} is too small.*257"):
        train_bpe(iter([TEXT]), vocab_size)


@given(st.text())
def test_any_text_survives_encoding_and_decoding(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["", "  \r\n\t x", "\0", "\ufeffa", "e\u0301 é 👩‍👩‍👧", "a<|endoftext|>b"])
def test_awkward_texts_survive(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_half_a_character_decodes_to_the_replacement_sign(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"


def test_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TenfoldError, match="not valid Unicode"):
        tokenizer.encode("a\ud800b")


def test_a_file_loads_like_its_folder(folder: Path, tokenizer: Tokenizer) -> None:
    assert load_tokenizer(folder / "tokenizer.json").encode(TEXT) == tokenizer.encode(TEXT)


@pytest.mark.parametrize("eos", ["<end>", {"content": "<end>", "lstrip": False}])
def test_the_config_beside_it_names_the_end_of_text(tmp_path: Path, eos: object) -> None:
    word_level(tmp_path, {"<unk>": 0, "<end>": 1, "<|endoftext|>": 2})
    assert load_tokenizer(tmp_path).eos_token_id == 2
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    assert load_tokenizer(tmp_path).eos_token_id == 1


def test_no_end_of_text_is_none(tmp_path: Path) -> None:
    word_level(tmp_path, {"<unk>": 0})
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(tmp_path).eos_token_id is None


def test_vocab_size_reaches_past_gaps(tmp_path: Path) -> None:
    word_level(tmp_path, {"<unk>": 0, "a": 9})
    assert load_tokenizer(tmp_path).vocab_size == 10


def test_truncation_padding_and_added_tokens_of_the_file_are_ignored(tmp_path: Path) -> None:
    raw = word_level(tmp_path, {"<unk>": 0, "<s>": 1, "a": 2})
    raw.enable_truncation(2)
    raw.enable_padding(length=8)
    raw.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    raw.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("a a a a") == [2, 2, 2, 2]


def test_missing_and_corrupt_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    assert f"{file}: no such file" in refusal(tmp_path)
    for content in (b"", b"{}", b"\xff\0", b'{"model": {"type": "BPE"}}'):
        file.write_bytes(content)
        assert f"{file}: not a Hugging Face tokenizer.json" in refusal(file)
    tokenizers.Tokenizer(models.BPE()).save(str(file))
    assert f"{file}: its vocabulary is empty" in refusal(file)


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token": {}}', '{"eos_token": 3}'])
def test_corrupt_config_is_named(tmp_path: Path, content: str) -> None:
    word_level(tmp_path, {"<unk>": 0})
    config = tmp_path / "tokenizer_config.json"
    config.write_text(content)
    assert str(config) in refusal(tmp_path)


def test_end_of_text_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    word_level(tmp_path, {"<unk>": 0})
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert "eos_token </s> is not in" in refusal(tmp_path)
