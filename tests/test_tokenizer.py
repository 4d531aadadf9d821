import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import TEXTS
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from tenfold.errors import TenfoldError
from tenfold.tokenizer import TextStream, Tokenizer, load_tokenizer, train_bpe

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


def test_for_training_truncation_padding_and_added_tokens_are_ignored(tmp_path: Path) -> None:
    raw = word_level(tmp_path, {"<unk>": 0, "<s>": 1, "a": 2})
    raw.enable_truncation(2)
    raw.enable_padding(length=8)
    raw.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    raw.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode_batch(["a a a a"]) == [[2, 2, 2, 2]]


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


BPE_FILES: dict[str, dict[str, Any]] = {
    "no token named": {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}},
    "named in the config": {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": {"content": "</s>", "lstrip": False, "__type": "AddedToken"},
            "pad_token": "<|im_end|>",
            "additional_special_tokens": ["<|im_start|>", "at"],
            "add_bos_token": False,
        }
    },
    "named in the older file": {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<s>"},
        "special_tokens_map.json": {
            "bos_token": "<s>",
            "eos_token": {"content": "</s>"},
            "unk_token": "<unk>",
        },
    },
    "the older file passed over": {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True}},
        },
        "special_tokens_map.json": {"eos_token": "</s>"},
    },
}


def write(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def byte_level(folder: Path, **parts: Any) -> tokenizers.Tokenizer:
    """A tokenizer.json with a vocabulary that has special tokens, not all of them known to be."""
    raw = train_bpe(iter([TEXT, "café ☕ naïve"]), 280)
    raw.add_special_tokens(["<unk>", "<|im_start|>"])
    raw.add_tokens([AddedToken("</s>", normalized=True), AddedToken("<|im_end|>", special=True, rstrip=True)])
    raw.add_tokens(["<s>"])
    for name, part in parts.items():
        setattr(raw, name, part)
    raw.save(str(folder / "tokenizer.json"))
    return raw


@pytest.mark.parametrize("files", BPE_FILES.values(), ids=BPE_FILES)
@pytest.mark.parametrize("adds", [False, True])
def test_equal_to_transformers(tmp_path: Path, files: dict[str, Any], adds: bool) -> None:
    parts: dict[str, Any] = {"normalizer": normalizers.NFC()}
    if adds:
        parts["post_processor"] = processors.TemplateProcessing(
            "<s> $A </s>", special_tokens=[("<s>", 284), ("</s>", 282)]
        )
    raw = byte_level(tmp_path, **parts)
    assert (raw.token_to_id("<s>"), raw.token_to_id("</s>")) == (284, 282)
    assert raw.token_to_id("at") is not None
    write(tmp_path, files)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        for skip in (False, True):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    named = {k: v for k, v in theirs.special_tokens_map.items() if k in ours.special_tokens}
    assert {**named, **ours.special_tokens} == {**ours.special_tokens, **theirs.special_tokens_map}
    if "eos_token" in theirs.special_tokens_map:
        assert ours.eos_token_id == theirs.eos_token_id
    assert (ours.bos_token_id, ours.pad_token_id) == (theirs.bos_token_id, theirs.pad_token_id)


@pytest.mark.parametrize(
    ("ends", "wanted"), [(None, (282,)), (7, (282, 7)), ([9, 282, 7], (282, 9, 7)), ([], (282,))]
)
def test_all_tokens_that_end_a_turn(tmp_path: Path, ends: object, wanted: tuple[int, ...]) -> None:
    byte_level(tmp_path)
    config = {"eos_token": "</s>"}
    write(tmp_path, {"tokenizer_config.json": config, "generation_config.json": {"eos_token_id": ends}})
    assert load_tokenizer(tmp_path).eos_token_ids == wanted


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("generation_config.json", '{"eos_token_id": "x"}'),
        ("generation_config.json", '{"eos_token_id": [-1]}'),
        ("special_tokens_map.json", '{"bos_token": 1}'),
        ("tokenizer_config.json", '{"chat_template": 1}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}'),
        ("chat_template.json", "[]"),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_whichever_file_is_corrupt_is_named(tmp_path: Path, name: str, content: str | bytes) -> None:
    byte_level(tmp_path)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(tmp_path / name) in refusal(tmp_path)


MESSAGE = [{"role": "user", "content": "hi"}]
NAMED = [{"name": "default", "template": "listed"}, {"name": "tool_use", "template": "tools"}]


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"tokenizer_config.json": {"chat_template": "config"}}, "config"),
        ({"tokenizer_config.json": {"chat_template": NAMED}}, "listed"),
        ({"chat_template.json": {"chat_template": "file"}}, "file"),
        ({"chat_template.jinja": "jinja", "tokenizer_config.json": {"chat_template": "config"}}, "jinja"),
    ],
)
def test_where_templates_are_found(tmp_path: Path, files: dict[str, Any], text: str) -> None:
    byte_level(tmp_path)
    write(tmp_path, files)
    assert load_tokenizer(tmp_path).apply_chat_template(MESSAGE, tokenize=False) == text


def test_templates_in_files_of_their_own(tmp_path: Path) -> None:
    byte_level(tmp_path)
    (tmp_path / "additional_chat_templates").mkdir()
    write(tmp_path, {"chat_template.jinja": "plain", "additional_chat_templates/tool_use.jinja": "tools"})
    loaded = load_tokenizer(tmp_path)
    assert loaded.apply_chat_template(MESSAGE, tokenize=False) == "plain"
    assert loaded.apply_chat_template(MESSAGE, [{"type": "function"}], tokenize=False) == "tools"


def test_a_rendered_template_gets_no_second_bos(tmp_path: Path) -> None:
    template = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 284)])
    byte_level(tmp_path, post_processor=template)
    config = {"bos_token": "<s>", "chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    write(tmp_path, {"tokenizer_config.json": config})
    loaded = load_tokenizer(tmp_path)
    assert loaded.apply_chat_template(MESSAGE) == loaded.encode("hi")
    assert loaded.encode("hi")[0] == 284


def test_what_is_saved_loads_as_it_was(tmp_path: Path) -> None:
    byte_level(tmp_path)
    files = BPE_FILES["named in the config"]
    files["tokenizer_config.json"]["chat_template"] = NAMED
    write(tmp_path, files | {"generation_config.json": {"eos_token_id": [282, 5]}})
    first = load_tokenizer(tmp_path)
    (tmp_path / "again").mkdir()
    first.save(tmp_path / "again")
    second, theirs = load_tokenizer(tmp_path / "again"), AutoTokenizer.from_pretrained(tmp_path / "again")
    assert second.special_tokens == first.special_tokens
    assert second.eos_token_ids == first.eos_token_ids == (282, 5)
    assert second.chat_template and first.chat_template
    assert second.chat_template.templates == first.chat_template.templates == theirs.chat_template
    for text in TEXTS:
        assert second.encode(text) == first.encode(text) == theirs.encode(text)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [stream.step(token) for token in ids]


@settings(deadline=None)
@given(st.text())
def test_streamed_pieces_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    pieces = streamed(tokenizer, tokenizer.encode(text + "."))
    assert "".join(pieces) == text + "."
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@settings(deadline=None)
@given(st.lists(st.integers(1, 256)))
def test_any_tokens_can_be_streamed(tokenizer: Tokenizer, ids: list[int]) -> None:
    whole = tokenizer.decode(ids)
    assert whole.startswith("".join(streamed(tokenizer, ids)))


def test_bytes_that_are_no_character_do_not_stop_a_stream() -> None:
    """In a tokenizer.json like Llama's, one bad byte unmakes the good ones before it, which were shown."""
    vocab = {"<unk>": 0, "<0x0A>": 1, "<0xC3>": 2, "x": 3}
    raw = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    assert streamed(Tokenizer(raw), [1, 2, 3]) == ["\n", "", "\ufffdx"]
