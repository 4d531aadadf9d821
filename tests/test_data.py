import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from tenfold.errors import TenfoldError
from tenfold.tokenizer import load_tokenizer, train_bpe
from tenfold.train import data, split, tokenise
from tenfold.train.data import TokenData, TrainOrder, prepare


def write_corpus(folder: Path, documents: int = 60) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(documents):
        words = " ".join(f"word{(number * 7 + n * n) % 50} é" for n in range(40))
        (folder / f"{number:02}.txt").write_text(f"document {number}\n{words}\n")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "texts")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def make(source: Path, cache: Path, vocab_size: int = 300) -> TokenData:
    return prepare([str(source)], None, vocab_size, cache)


def documents(tokens: np.ndarray, prepared: TokenData) -> list[str]:
    text = prepared.tokenizer.decode(tokens.tolist())
    assert text.endswith("<|endoftext|>")
    return text.split("<|endoftext|>")[:-1]


def refusal(source: Path, cache: Path, vocab_size: int = 300) -> str:
    with pytest.raises(TenfoldError) as caught:
        make(source, cache, vocab_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_document_is_in_exactly_one_part(source: Path, cache: Path) -> None:
    prepared = make(source, cache)
    train, valid = (documents(part, prepared) for part in (prepared.train, prepared.valid))
    assert sorted(train + valid) == sorted(path.read_text() for path in source.iterdir())
    assert not set(train) & set(valid)
    total = sum(path.stat().st_size for path in source.iterdir())
    assert prepared.valid_bytes == len("".join(valid).encode())
    assert 0.05 * total <= prepared.valid_bytes < 0.1 * total


def test_the_split_follows_content_not_names_or_order(source: Path, cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "renamed"
    other.mkdir()
    for number, path in enumerate(sorted(source.iterdir(), reverse=True)):
        (other / f"x{number:02}.md").write_text(path.read_text())
    first, second = make(source, cache), make(other, tmp_path / "cache2")
    assert set(documents(first.valid, first)) == set(documents(second.valid, second))
    # Read in another order the tokens are others, and must not be taken for the same.
    assert first.key != second.key


def test_copies_count_once(source: Path, cache: Path, tmp_path: Path) -> None:
    alone = make(source, cache)
    for path in list(source.iterdir()):
        (source / f"copy-{path.name}").write_text(path.read_text())
    doubled = make(source, tmp_path / "cache2")
    assert doubled.key == alone.key
    assert np.array_equal(doubled.train, alone.train)
    assert np.array_equal(doubled.valid, alone.valid)


def test_held_out_text_is_capped(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "HELD_OUT_ENOUGH", 100)
    prepared = make(source, cache)
    assert len(documents(prepared.valid, prepared)) == 1


def test_bpe_never_sees_held_out_text(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def spy(texts, vocab_size):  # type: ignore[no-untyped-def]
        seen.extend(texts)
        return train_bpe(iter(seen), vocab_size)

    monkeypatch.setattr(data, "train_bpe", spy)
    prepared = make(source, cache)
    assert seen == documents(prepared.train, prepared)
    monkeypatch.setattr(data, "BPE_BYTES", 1000)
    seen.clear()
    make(source, cache, vocab_size=301)
    assert 1 < len(seen) < 5


@pytest.mark.parametrize("book_first", [True, False])
def test_a_long_book_beside_a_note_is_trained_on(tmp_path: Path, cache: Path, book_first: bool) -> None:
    # The note's text is chosen so that its hash sorts on either side of the book's.
    book = "a long book\n" * 500
    hashes = {text: split.hashlib.sha256(text.encode()).digest() for text in map(str, range(5000))}
    limit = split.hashlib.sha256(book.encode()).digest()
    note = next(text for text, digest in hashes.items() if (digest > limit) == book_first)
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "book.txt").write_text(book)
    (folder / "note.txt").write_text(note)
    prepared = make(folder, cache)
    assert documents(prepared.train, prepared) == [book]
    assert documents(prepared.valid, prepared) == [note]


def test_a_single_document_is_cut_at_a_line(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "one.txt"
    lines = [f"line {n} é\n" for n in range(200)]
    path.write_text("".join(lines))
    prepared = make(path, cache)
    [train], [valid] = (documents(part, prepared) for part in (prepared.train, prepared.valid))
    assert train + valid == path.read_text()
    assert train.endswith("\n")
    assert 0.05 <= prepared.valid_bytes / path.stat().st_size < 0.06


def test_a_single_line_is_cut_between_characters(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("👩é" * 101)
    prepared = make(path, cache)
    [train], [valid] = (documents(part, prepared) for part in (prepared.train, prepared.valid))
    assert train + valid == path.read_text()
    assert 0.05 <= prepared.valid_bytes / path.stat().st_size < 0.07


def test_one_character_is_refused(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("👩")
    assert str(path) in refusal(path, cache)
    assert not any(cache.iterdir())


def test_long_documents_are_tokenised_in_pieces_to_the_same_ids(
    source: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(source, cache)
    monkeypatch.setattr(tokenise, "PIECE_CHARS", 10)
    monkeypatch.setattr(tokenise, "BATCH_CHARS", 50)
    pieces = list(tokenise._pieces(iter([(False, "a  b c\n d\te f g h i j k l m n o p")])))
    assert len(pieces) > 2
    cut = make(source, tmp_path / "cache2")
    assert np.array_equal(cut.train, whole.train)
    assert np.array_equal(cut.valid, whole.valid)


def test_second_call_does_not_tokenise(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(source, cache)
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    monkeypatch.setattr(data, "write_tokens", None)
    second = make(source, cache)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before
    assert (second.folder, second.eos_token_id) == (first.folder, 0)
    assert np.array_equal(second.train, first.train)


def test_the_key_covers_content_and_tokenizer(source: Path, cache: Path, tmp_path: Path) -> None:
    first = make(source, cache)
    keys = {first.key, make(source, cache, vocab_size=301).key}
    keys.add(prepare([str(source)], first.folder, 300, cache).key)
    (source / "00.txt").write_text("changed")
    keys.add(make(source, cache).key)
    assert len(keys) == 4


def test_a_failed_build_leaves_nothing(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "write_tokens", fail)
        make(source, cache)
    assert not any(cache.iterdir())
    assert len(make(source, cache).train)


def test_two_builders_at_once(source: Path, cache: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: make(source, cache), range(4)))
    assert [path.name for path in cache.iterdir()] == [found[0].key]
    assert all(np.array_equal(one.train, found[0].train) for one in found)


def test_losing_the_race_keeps_the_winner(source: Path, cache: Path, tmp_path: Path) -> None:
    winner = make(source, cache).folder
    loser = tmp_path / "loser"
    loser.mkdir()
    (loser / "meta.json").write_text("{}")
    data._publish(loser, winner)
    assert (winner / "train.bin").is_file()
    with pytest.raises(OSError):
        data._publish(tmp_path / "nothing", tmp_path / "nowhere" / "key")


@pytest.mark.parametrize("harm", ["truncate", "remove", "meta"])
def test_damaged_cache_is_named(source: Path, cache: Path, harm: str) -> None:
    folder = make(source, cache).folder
    match harm:
        case "truncate":
            (folder / "train.bin").write_bytes(b"\0\0")
        case "remove":
            (folder / "valid.bin").unlink()
        case "meta":
            (folder / "meta.json").write_text("{}")
    assert f"{folder}: damaged token cache" in refusal(source, cache)


def test_cache_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert "TENFOLD_CACHE" in refusal(source, file / "cache")


def test_default_cache(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENFOLD_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data._default_cache() == tmp_path / ".cache" / "tenfold"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data._default_cache() == tmp_path / "xdg" / "tenfold"
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "own"))
    assert prepare([str(source)], None, 300).folder.parent == tmp_path / "own"


def test_a_text_that_changes_between_the_passes_is_refused(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    surveyed = split.survey([str(source)])
    monkeypatch.setattr(data, "survey", lambda sources: surveyed)
    (source / "00.txt").write_text("changed")
    assert "00.txt: changed" in refusal(source, cache)
    (source / "00.txt").unlink()
    assert "changed while being read" in refusal(source, cache)


def word_level(folder: Path, vocab: dict[str, int]) -> Path:
    raw = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=next(iter(vocab))))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.save(str(folder / "words.json"))
    return folder / "words.json"


def test_given_tokenizer_is_used_and_kept(source: Path, cache: Path, tmp_path: Path) -> None:
    path = word_level(tmp_path, {"<unk>": 0, "document": 1, "<end>": 70000})
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    prepared = prepare([str(source)], path, 300, cache)
    assert (prepared.eos_token_id, prepared.vocab_size) == (70000, 70001)
    assert prepared.train.dtype == np.uint32
    together = np.concatenate([prepared.train, prepared.valid])
    assert (together == 70000).sum() == (together == 1).sum() == 60
    assert load_tokenizer(prepared.folder).eos_token_id == 70000


def test_bad_tokenizers_and_vocabularies(source: Path, cache: Path, tmp_path: Path) -> None:
    assert "vocab_size 256" in refusal(source, cache, vocab_size=256)
    with pytest.raises(TenfoldError, match="no such file"):
        prepare([str(source)], tmp_path / "none.json", 300, cache)
    with pytest.raises(TenfoldError, match="no token ends a text"):
        prepare([str(source)], word_level(tmp_path, {"<unk>": 0}), 300, cache)


def test_text_that_comes_to_one_token_is_refused(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("a" * 50 + "\n\n\n\n\n")
    words = word_level(tmp_path, {"<unk>": 0, "<|endoftext|>": 1})
    with pytest.raises(TenfoldError, match="valid part has 1 token"):
        prepare([str(path)], words, 300, cache)


def test_bits_per_byte_of_a_uniform_guess(source: Path, cache: Path) -> None:
    prepared = make(source, cache)
    tokens = len(prepared.valid)
    bits = tokens * math.log2(prepared.vocab_size) / prepared.valid_bytes
    nats = math.log(prepared.vocab_size)
    assert prepared.bits_per_byte(tokens * nats, tokens) == pytest.approx(bits)
    assert prepared.bits_per_byte(10 * nats, 10) == pytest.approx(bits)


@pytest.mark.parametrize(("seq_len", "batch_size"), [(1, 1), (7, 3), (16, 4), (100_000, 2)])
def test_validation_covers_every_target_once(
    source: Path, cache: Path, seq_len: int, batch_size: int
) -> None:
    prepared = make(source, cache)
    batches = list(prepared.validation_batches(seq_len, batch_size))
    inputs = torch.cat([inputs.flatten() for inputs, _ in batches])
    targets = torch.cat([targets.flatten() for _, targets in batches])
    stream = torch.from_numpy(prepared.valid.astype(np.int64))
    assert torch.equal(inputs, stream[:-1])
    assert torch.equal(targets, stream[1:])
    assert all(len(inputs) <= batch_size for inputs, _ in batches)
    assert all(inputs.shape[1] == seq_len for inputs, _ in batches[:-1])


def test_sizes_below_one_are_refused(source: Path, cache: Path) -> None:
    prepared = make(source, cache)
    with pytest.raises(TenfoldError, match="batch_size must be at least 1, not 0"):
        next(prepared.validation_batches(8, 0))
    with pytest.raises(TenfoldError, match="seq_len must be at least 1, not 0"):
        TrainOrder(prepared.train, 0, seed=0)
    with pytest.raises(TenfoldError, match="seed must be 0 or more, not -1"):
        TrainOrder(prepared.train, 8, seed=-1)


STREAM = np.arange(1003, dtype=np.uint16)


@given(st.integers(0, 300), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 99))
def test_batches_do_not_depend_on_how_they_are_split(first: int, counts: list[int], seed: int) -> None:
    order = TrainOrder(STREAM, 10, seed)
    whole = order.batch(first, sum(counts))
    starts = np.cumsum([first, *counts[:-1]]).tolist()
    parts = [order.batch(start, count) for start, count in zip(starts, counts, strict=True)]
    for side in (0, 1):
        assert torch.equal(whole[side], torch.cat([part[side] for part in parts]))


def test_an_epoch_sees_every_window_once_in_its_own_order() -> None:
    order = TrainOrder(STREAM, 10, seed=1)
    assert order.windows == 100
    inputs, targets = order.batch(0, 100)
    assert (inputs.dtype, targets.dtype) == (torch.int64, torch.int64)
    assert inputs.is_contiguous() and targets.is_contiguous()
    assert torch.equal(targets, inputs + 1)
    assert sorted(inputs[:, 0].tolist()) == list(range(0, 1000, 10))
    assert sorted(order.batch(100, 100)[0].flatten().tolist()) == list(range(1000))
    assert not torch.equal(inputs, order.batch(100, 100)[0])
    assert not torch.equal(inputs, TrainOrder(STREAM, 10, seed=2).batch(0, 100)[0])
    assert torch.equal(inputs, TrainOrder(STREAM, 10, seed=1).batch(0, 100)[0])


def test_the_order_is_the_same_in_every_release() -> None:
    starts = TrainOrder(STREAM, 10, seed=0).batch(0, 5)[0][:, 0]
    assert starts.tolist() == [820, 360, 200, 50, 930]


def test_the_shortest_training_text() -> None:
    inputs, targets = TrainOrder(STREAM[:9], 8, seed=0).batch(0, 2)
    assert inputs.tolist() == [list(range(8))] * 2
    assert targets.tolist() == [list(range(1, 9))] * 2
    with pytest.raises(TenfoldError, match=r"has 8 tokens .* seq_len 8 needs 9"):
        TrainOrder(STREAM[:8], 8, seed=0)


def test_no_progress_bar_unless_stderr_is_a_terminal(
    source: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make(source, cache)
    assert capfd.readouterr() == ("", "")


def test_corpus_errors_pass_through(tmp_path: Path, cache: Path) -> None:
    assert "no such file or folder" in refusal(tmp_path / "none", cache)
