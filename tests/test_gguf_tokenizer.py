"""Tokenizers out of GGUF metadata."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from texts import TEXTS
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from tenfold.errors import TenfoldError
from tenfold.tokenizer import load_tokenizer, tokenizer_from_gguf, train_bpe
from tenfold.tokenizer.pre_tokenizers import PRE_TOKENIZERS

KEY = "tokenizer.ggml."
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def byte_level(pre: str | None = "gpt-2", **more: Any) -> dict[str, Any]:
    """The metadata of a byte-level BPE trained here, with four added tokens at its end."""
    raw = train_bpe(iter(TEXTS * 5 + ["the cat sat on the mat"] * 9), 400)
    tokens = [raw.id_to_token(i) for i in range(raw.get_vocab_size())]
    model = raw.to_str()
    merges = [" ".join(pair) for pair in json.loads(model)["model"]["merges"]]
    types = [CONTROL] + [NORMAL] * (len(tokens) - 1)
    metadata = {
        KEY + "model": "gpt2",
        KEY + "tokens": [*tokens, "<|im_start|>", "<|im_end|>", "</s>", "<s>"],
        KEY + "token_type": [*types, CONTROL, CONTROL, USER_DEFINED, CONTROL],
        KEY + "merges": merges,
        KEY + "bos_token_id": len(tokens) + 3,
        KEY + "eos_token_id": len(tokens) + 1,
    }
    return (
        metadata | ({KEY + "pre": pre} if pre else {}) | {KEY + name: value for name, value in more.items()}
    )


def sentencepiece(**more: Any) -> tuple[dict[str, Any], bytes]:
    """The metadata of a SentencePiece BPE trained here, and the model itself."""
    data = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5 + ["the cat sat on the mat"] * 9),
        model_writer=data,
        vocab_size=450,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<turn>", "▁▁"],
        num_threads=1,
        minloglevel=3,
    )
    pieces = ModelProto.FromString(data.getvalue()).pieces
    metadata = {
        KEY + "model": "llama",
        KEY + "tokens": [piece.piece for piece in pieces],
        KEY + "scores": [piece.score for piece in pieces],
        KEY + "token_type": [piece.type for piece in pieces],
        KEY + "bos_token_id": 1,
        KEY + "eos_token_id": 2,
        KEY + "unknown_token_id": 0,
    }
    return metadata | {KEY + name: value for name, value in more.items()}, data.getvalue()


def write(file: Path, metadata: dict[str, Any]) -> Path:
    writer = GGUFWriter(file, "llama")
    for name, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def test_byte_level_is_the_vocabulary_it_was_made_from() -> None:
    trained = train_bpe(iter(TEXTS * 5 + ["the cat sat on the mat"] * 9), 400)
    for pre in ("gpt-2", "default", None):
        loaded = tokenizer_from_gguf(byte_level(pre), "x.gguf")
        for text in TEXTS[:-2]:  # these have the added tokens, which the other does not know
            assert loaded.encode(text) == trained.encode(text).ids
            assert loaded.decode(loaded.encode(text)) == text


@pytest.mark.parametrize("pre", sorted(set(PRE_TOKENIZERS) & set(GGUF_PRE_TOKENIZER_SPLITS)))
@settings(deadline=None, max_examples=60)
@given(text=st.lists(st.sampled_from([*TEXTS, "'S", "ǅ", "\u0301"]) | st.text(max_size=4)).map("".join))
def test_cut_as_transformers_cuts(pre: str, text: str) -> None:
    theirs = pre_tokenizers.Split(tokenizers.Regex(GGUF_PRE_TOKENIZER_SPLITS[pre]), "isolated")
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    wanted = pre_tokenizers.Sequence([theirs, alphabet]).pre_tokenize_str(text)
    assert PRE_TOKENIZERS[pre].build().pre_tokenize_str(text) == wanted


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from(TEXTS) | st.text(max_size=4)).map("".join))
def test_smollm_cuts_digits_apart(text: str) -> None:
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    wanted = pre_tokenizers.Sequence(parts).pre_tokenize_str(text)
    assert PRE_TOKENIZERS["smollm"].build().pre_tokenize_str(text) == wanted


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("deepseek-llm", ["The", " cat", "\n", "\n", "ends", " ...", " ", "2024", "年", "б", "ა"]),
        (
            "deepseek-coder",
            ["The", " cat", "\n", "\n", "ends", " ...", " ", "2", "0", "2", "4", "年", "б", "ა"],
        ),
        ("deepseek-v3", ["The", " cat", "\n\n", "ends", " ...", " ", "202", "4", "年", "бა"]),
    ],
)
def test_deepseeks_ways_to_cut(pre: str, pieces: list[str]) -> None:
    text = "".join(pieces)
    cuts = [text[slice(*span)] for _, span in PRE_TOKENIZERS[pre].build().pre_tokenize_str(text)]
    assert cuts == pieces


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "gpt-4o", "tekken"])
def test_byte_level_equals_transformers_reading_of_the_file(tmp_path: Path, pre: str) -> None:
    metadata = byte_level(pre, add_bos_token=True)
    write(tmp_path / "x.gguf", metadata)
    ours = tokenizer_from_gguf(metadata, "x.gguf")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    for text in TEXTS:
        if pre == "qwen2" and "e\u0301" in text:
            continue  # transformers forgets that Qwen composes characters
        assert ours.encode(text) == theirs.encode(text)
        for skip in (False, True):
            ids = ours.encode(text)
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.sampled_from(["the", "aa", " ", "  ", "\n", "<turn>", "☕"]) | st.text(max_size=3)).map(
        "".join
    )
)
def test_sentencepiece_is_the_model_it_was_made_from(text: str) -> None:
    assert FROM_GGUF.encode(text, add_special_tokens=False) == FROM_MODEL.encode(text)
    assert FROM_GGUF.decode(FROM_MODEL.encode(text)) == FROM_MODEL.decode(FROM_MODEL.encode(text))


METADATA, MODEL = sentencepiece()
FROM_GGUF, FROM_MODEL = tokenizer_from_gguf(METADATA, "x.gguf"), SentencePieceProcessor(model_proto=MODEL)


def test_spaces_are_spelled_either_way() -> None:
    """Gemma's files have real ones in its tokens for runs of them."""
    tokens = [token.replace("▁▁", "  ") for token in METADATA[KEY + "tokens"]]
    assert "  " in tokens
    spelled = tokenizer_from_gguf(METADATA | {KEY + "tokens": tokens}, "x.gguf")
    assert spelled.encode("a   b") == FROM_GGUF.encode("a   b")


def test_what_the_file_leaves_open_is_as_in_llama_cpp() -> None:
    assert FROM_GGUF.encode("</s>the")[:2] == [1, 2]
    assert FROM_GGUF.decode(FROM_GGUF.encode("</s>the")) == "<s></s> the"
    plain = tokenizer_from_gguf(
        METADATA | {KEY + "add_bos_token": False, KEY + "add_space_prefix": False}, "x"
    )
    assert plain.decode(plain.encode("</s>the")) == "</s>the"
    adds = {pre: tokenizer_from_gguf(byte_level(pre), "x").encode("a") for pre in ("qwen2", "llama-bpe")}
    assert len(adds["qwen2"]) == 1 and len(adds["llama-bpe"]) == 2


def test_llamas_words_that_are_tokens_need_no_merges() -> None:
    tokens = ["a", "b", "c", "abc"]
    for pre, ids in (("llama-bpe", [3]), ("gpt-2", [0, 1, 2])):
        metadata = {KEY + "model": "gpt2", KEY + "pre": pre, KEY + "tokens": tokens, KEY + "merges": []}
        assert tokenizer_from_gguf(metadata, "x.gguf").encode("abc") == ids


def test_an_empty_token_is_no_special_token() -> None:
    metadata = byte_level()
    place = metadata[KEY + "tokens"].index("<|im_start|>")
    metadata[KEY + "tokens"][place], metadata[KEY + "token_type"][place] = "", NORMAL
    assert place not in tokenizer_from_gguf(metadata, "x.gguf").encode("the cat sat on the mat")


def test_special_tokens_and_templates() -> None:
    count = len(byte_level()[KEY + "tokens"])
    template = {"tokenizer.chat_template": "{{ bos_token }}", "tokenizer.chat_template.tool_use": "tools"}
    loaded = tokenizer_from_gguf(byte_level(eot_token_id=0, padding_token_id=5) | template, "x.gguf")
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (count - 1, count - 3, 5)
    assert loaded.eos_token_ids == (count - 3, 0)
    assert loaded.vocab_size == count
    message = [{"role": "user", "content": ""}]
    assert loaded.apply_chat_template(message, tokenize=False) == "<s>"
    assert loaded.apply_chat_template(message) == [count - 1]
    assert loaded.apply_chat_template(message, [{}], tokenize=False) == "tools"
    assert loaded.decode(loaded.encode("<s>a</s>"), skip_special_tokens=True) == "a</s>"


@pytest.mark.parametrize("metadata", [byte_level("llama-bpe"), METADATA], ids=["gpt2", "llama"])
def test_what_is_saved_loads_as_it_was(tmp_path: Path, metadata: dict[str, Any]) -> None:
    first = tokenizer_from_gguf(metadata | {"tokenizer.chat_template": "hi"}, "x.gguf")
    first.save(tmp_path)
    second = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert second.encode(text) == first.encode(text)
    assert second.special_tokens == first.special_tokens
    assert second.chat_template and second.chat_template.templates == {"default": "hi"}


BAD = [
    ("gpt2", {"model": "bert"}, "only llama and gpt2"),
    ("gpt2", {"model": None}, "model is missing"),
    ("gpt2", {"pre": "klingon"}, "'klingon' is not known, only command-r"),
    ("gpt2", {"merges": None}, "merges is missing"),
    ("gpt2", {"merges": ["a"]}, "not two tokens"),
    ("gpt2", {"merges": ["zz yy"]}, "merges"),
    ("gpt2", {"tokens": []}, "is empty"),
    ("gpt2", {"tokens": ["a", "b", "a"]}, "'a' 2 times"),
    ("gpt2", {"tokens": ["a", 3]}, "holds 3, not texts"),
    ("gpt2", {"tokens": ["\ud800"]}, "not UTF-8"),
    ("gpt2", {"tokens": "abc"}, "must be an array"),
    ("gpt2", {"token_type": [1]}, "has 1 entries for"),
    ("gpt2", {"eos_token_id": 10**6}, "is none of its"),
    ("gpt2", {"add_bos_token": "yes"}, "true or false"),
    ("llama", {"scores": None}, "scores is missing"),
    ("llama", {"scores": [float("nan")] * len(METADATA[KEY + "tokens"])}, "not finite"),
    ("llama", {"token_type": [9] * len(METADATA[KEY + "tokens"])}, "holds 9"),
    ("llama", {"token_type": [2] * len(METADATA[KEY + "tokens"])}, "not a whole SentencePiece model"),
]


@pytest.mark.parametrize(("kind", "changes", "words"), BAD, ids=lambda value: str(value)[:40])
def test_bad_metadata_is_named(kind: str, changes: dict[str, Any], words: str) -> None:
    metadata = dict(byte_level() if kind == "gpt2" else METADATA)
    metadata |= {KEY + name: value for name, value in changes.items()}
    with pytest.raises(TenfoldError, match=words) as caught:
        tokenizer_from_gguf(metadata, "x.gguf")
    assert str(caught.value).startswith("x.gguf: ") and "\n" not in str(caught.value)


VALUES = st.none() | st.booleans() | st.integers(-9, 500) | st.floats() | st.text(max_size=5)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from([byte_level(), METADATA]), st.data())
def test_any_metadata_loads_or_is_refused(metadata: dict[str, Any], data: st.DataObject) -> None:
    metadata = dict(metadata)
    for name in data.draw(st.lists(st.sampled_from(sorted(metadata)), min_size=1, max_size=2)):
        if isinstance(metadata[name], list) and metadata[name] and data.draw(st.booleans()):
            at = data.draw(st.integers(0, len(metadata[name]) - 1))
            metadata[name] = [*metadata[name][:at], data.draw(VALUES), *metadata[name][at + 1 :]]
        else:
            metadata[name] = data.draw(VALUES | st.lists(VALUES, max_size=4))
    try:
        loaded = tokenizer_from_gguf(metadata, "x.gguf")
    except TenfoldError:
        return
    loaded.decode(loaded.encode("the cat <s>☕"))
