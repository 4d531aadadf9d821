"""SentencePiece models: cut and joined as the sentencepiece package does, special tokens as transformers."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from texts import TEXTS
from transformers import AutoTokenizer

from tenfold.errors import TenfoldError
from tenfold.tokenizer import TextStream, Tokenizer, load_tokenizer
from tenfold.train.data import prepare

KINDS: dict[str, dict[str, Any]] = {
    "bpe like Llama's": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "control_symbols": ["[INST]"],
    },
    "bpe like Gemma's": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<turn>", "▁▁", "\n", "\n\n"],
    },
    "unigram like T5's": {"model_type": "unigram", "byte_fallback": False},
    "unigram, folded": {
        "model_type": "unigram",
        "byte_fallback": True,
        "normalization_rule_name": "nfkc_cf",
        "pad_id": 3,
    },
    "characters": {"model_type": "char", "bos_id": -1, "eos_id": 1, "unk_id": 0},
}


def train(options: dict[str, Any]) -> bytes:
    data = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS, "the cat sat on the mat, aa aaa aaaa"] * 5),
        model_writer=data,
        vocab_size=420 if options["model_type"] != "char" else 100,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=3,
        **options,
    )
    return data.getvalue()


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("model") / "tokenizer.model"
    file.write_bytes(train(request.param))
    return file


@pytest.fixture(scope="module")
def ours(model: Path) -> Tokenizer:
    return load_tokenizer(model)


@pytest.fixture(scope="module")
def theirs(model: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(model))


def names_special(theirs: SentencePieceProcessor, text: str) -> bool:
    special = (theirs.is_control, theirs.is_unknown)
    ids = range(theirs.vocab_size())
    return any(theirs.id_to_piece(i) in text for i in ids if any(test(i) for test in special))


WORDS = st.sampled_from(
    ["the", "aa", "a", " ", "  ", "▁", "\n", "\n\n", "<turn>", "é", "e\u0301", "ﬁ", "☕", "🙂", "\t"]
)


@settings(deadline=None, max_examples=200)
@given(st.lists(WORDS | st.text(max_size=3)).map("".join))
def test_text_becomes_what_sentencepiece_makes_of_it(
    ours: Tokenizer, theirs: SentencePieceProcessor, text: str
) -> None:
    ids = theirs.encode(text)
    if not names_special(theirs, text):
        assert ours.encode(text) == ids
    if theirs.unk_id() not in ids:  # sentencepiece spells unknown ⁇, transformers <unk>
        assert ours.decode(ids) == theirs.decode(ids)
        stream = TextStream(ours)
        assert ours.decode(ids).startswith("".join(stream.step(token) for token in ids))


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_any_ids_become_what_sentencepiece_makes_of_them(
    ours: Tokenizer, theirs: SentencePieceProcessor, data: st.DataObject
) -> None:
    """Bytes that are no character too."""
    plain = [i for i in range(theirs.vocab_size()) if not (theirs.is_control(i) or theirs.is_unknown(i))]
    ids = data.draw(st.lists(st.sampled_from(plain)))
    assert ours.decode(ids) == theirs.decode(ids)


def test_special_tokens_are_the_models(ours: Tokenizer, theirs: SentencePieceProcessor) -> None:
    ids = [theirs.bos_id(), theirs.eos_id(), theirs.unk_id(), theirs.pad_id()]
    wanted = [None if i < 0 else i for i in ids]
    assert [ours.bos_token_id, ours.eos_token_id, ours.unk_token_id, ours.pad_token_id] == wanted
    assert ours.eos_token_ids == (ours.eos_token_id,)
    assert ours.vocab_size == theirs.vocab_size()
    assert ours.encode("a</s>")[-1] == ours.eos_token_id
    assert ours.decode(ours.encode("a</s>"), skip_special_tokens=True) == "a"


def folder(tmp_path: Path, **config: Any) -> Path:
    (tmp_path / "tokenizer.model").write_bytes(train(KINDS["bpe like Llama's"]))
    tokenizer_config = {"tokenizer_class": "LlamaTokenizer", **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return tmp_path


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"legacy": True, "add_bos_token": True},
        {"legacy": False, "add_bos_token": True, "add_eos_token": True},
        {"add_prefix_space": False, "add_eos_token": True},
        {"pad_token": "</s>", "bos_token": "[INST]", "add_bos_token": True},
    ],
    ids=str,
)
def test_a_folder_is_taken_as_transformers_takes_it(tmp_path: Path, config: dict[str, Any]) -> None:
    """But for runs of spaces and a first one, where transformers 5.23 differs from SentencePiece."""
    ours, theirs = load_tokenizer(folder(tmp_path, **config)), AutoTokenizer.from_pretrained(tmp_path)
    for text in ["Hello world", "half</s>a<s>b [INST]the cat", "naïve ☕ 日本", "a\n\nb\tc", "", "<unk>x"]:
        for special in (False, True):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            for skip in (False, True):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert (ours.bos_token_id, ours.pad_token_id) == (theirs.bos_token_id, theirs.pad_token_id)


def test_t5s_sentinels_and_end(tmp_path: Path) -> None:
    options = {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    (tmp_path / "spiece.model").write_bytes(train(options))
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the cat <extra_id_0> on<extra_id_1>mat", "naïve, a  b ", ""):
        assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode("<extra_id_0> the <extra_id_99>")) == "<extra_id_0> the<extra_id_99></s>"
    assert ours.encode("<extra_id_0>") == [ours.vocab_size - 1, 1]
    (tmp_path / "again").mkdir()
    ours.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").files() == ours.files()


@pytest.mark.parametrize("kept_in", ["tokenizer_config.json", "added_tokens.json"])
def test_tokens_added_to_a_model(tmp_path: Path, kept_in: str) -> None:
    model = folder(tmp_path)
    first = load_tokenizer(model).vocab_size
    if kept_in == "added_tokens.json":
        (model / kept_in).write_text(json.dumps({"<|im_end|>": first, "<|im_start|>": first + 1}))
    else:
        entries = [{"content": text, "special": True} for text in ("<|im_end|>", "<|im_start|>")]
        added = {str(first + i): entry for i, entry in enumerate(entries)}
        folder(model, added_tokens_decoder={"0": {"content": "<unk>"}, **added}, eos_token="<|im_end|>")
    ours, theirs = load_tokenizer(model), AutoTokenizer.from_pretrained(model)
    text = "<|im_start|>the cat<|im_end|>"
    assert ours.encode(text) == theirs.encode(text) and ours.encode(text)[0] == first + 1
    assert ours.vocab_size == first + 2
    assert ours.eos_token_id == theirs.eos_token_id


def test_what_is_saved_loads_as_it_was(tmp_path: Path) -> None:
    model = folder(tmp_path, legacy=True, add_bos_token=True, chat_template="hi")
    count = load_tokenizer(model).vocab_size
    (model / "added_tokens.json").write_text(json.dumps({"<|im_end|>": count}))
    first = load_tokenizer(model)
    (tmp_path / "again").mkdir()
    first.save(tmp_path / "again")
    second = load_tokenizer(tmp_path / "again")
    for text in [*TEXTS, "a</s>b<|im_end|>c"]:
        assert second.encode(text) == first.encode(text)
        assert second.decode(first.encode(text)) == first.decode(first.encode(text))
    assert second.files() == first.files()


def test_threads_and_batches_share_one(ours: Tokenizer) -> None:
    assert ours.encode_batch(TEXTS * 20) == [ours.encode(text) for text in TEXTS] * 20


def test_a_model_is_trained_on_such_tokens(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the cat sat on mat {i}" for i in range(200)))
    data = prepare([str(text)], model, 300, tmp_path / "cache")
    ours = load_tokenizer(model)
    assert data.vocab_size == ours.vocab_size and data.eos_token_id == ours.eos_token_id
    assert "the cat sat" in data.tokenizer.decode(data.train[:50].tolist())
    assert data.tokenizer.encode("the cat </s>") == ours.encode("the cat </s>")


def refusal(path: Path) -> str:
    with pytest.raises(TenfoldError) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xff", b"IQ== 0\nIg== 1\n", b"\n\x03\n\x01a"])
def test_what_is_no_model_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    assert f"{file}: not a" in refusal(tmp_path)


@pytest.mark.parametrize(("token", "words"), [(5, "have id 5"), (100_000, "too few pieces")])
def test_added_tokens_that_do_not_fit(tmp_path: Path, token: int, words: str) -> None:
    added = {str(token): {"content": "<new>"}}
    assert words in refusal(folder(tmp_path, added_tokens_decoder=added))


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2000) | st.integers(0, 300_000), st.integers(0, 30), st.binary(max_size=20))
def test_damaged_models_load_or_are_refused(model: Path, at: int, cut: int, put: bytes) -> None:
    whole = model.read_bytes()
    at %= len(whole)
    damaged = model.with_name("damaged.model")
    damaged.write_bytes(whole[:at] + put + whole[at + cut :])
    try:
        tokenizer = load_tokenizer(damaged)
    except TenfoldError:
        return
    tokenizer.decode(tokenizer.encode("the cat <s>☕"))
