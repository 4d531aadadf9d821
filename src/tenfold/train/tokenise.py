"""Documents to raw files of token ids, a few megabytes of text at a time."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tenfold.errors import TenfoldError
from tenfold.tokenizer import END_OF_TEXT, Tokenizer
from tenfold.train.split import Split, progress_bar, split_texts

PIECE_CHARS = 1_000_000  # of a long document, encoded at once
BATCH_CHARS = 4_000_000


def write_tokens(folder: Path, sources: Sequence[str], split: Split, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write train.bin and valid.bin, each document followed by the end-of-text token.

    Returns meta.json's content. Raises TenfoldError if a part comes to fewer than 2 tokens.
    """
    eos = end_of_text(tokenizer, folder)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    tokens = {"train": 0, "valid": 0}
    sizes = {"train": 0, "valid": 0}
    with (
        (folder / "train.bin").open("wb") as train,
        (folder / "valid.bin").open("wb") as valid,
        progress_bar() as progress,
    ):
        task = progress.add_task("tokenising", total=sum(split.sizes.values()))
        for batch in _batches(_pieces(split_texts(sources, split))):
            encoded = tokenizer.encode_batch([piece.text for piece in batch])
            for piece, ids in zip(batch, encoded, strict=True):
                ended = [*ids, eos] if piece.last else ids
                np.array(ended, dtype).tofile(valid if piece.held_out else train)
                part = "valid" if piece.held_out else "train"
                tokens[part] += len(ended)
                sizes[part] += len(piece.text.encode())
            progress.update(task, completed=sum(sizes.values()))
    for part, count in tokens.items():
        if count < 2:
            raise TenfoldError(
                f"{', '.join(sources)}: the {part} part has {count} token and 2 are needed: give"
                " more text, or a tokenizer that knows it"
            )
    return {
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": eos,
        "train_tokens": tokens["train"],
        "train_bytes": sizes["train"],
        "valid_tokens": tokens["valid"],
        "valid_bytes": sizes["valid"],
    }


@dataclass(frozen=True)
class _Piece:
    held_out: bool
    text: str
    last: bool  # of its document


def _pieces(texts: Iterator[tuple[bool, str]]) -> Iterator[_Piece]:
    """Long documents cut where a single space starts a word: byte-level BPE never joins over it."""
    for held_out, text in texts:
        start = 0
        while boundary := _WORD_START.search(text, start + PIECE_CHARS):
            yield _Piece(held_out, text[start : boundary.start()], last=False)
            start = boundary.start()
        yield _Piece(held_out, text[start:], last=True)


_WORD_START = re.compile(r"(?<=\S)(?= \S)")


def _batches(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    chars = 0
    for piece in pieces:
        batch.append(piece)
        chars += len(piece.text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def end_of_text(tokenizer: Tokenizer, path: Path) -> int:
    """Its end-of-text token; TenfoldError, naming `path`, if it has none."""
    if tokenizer.eos_token_id is None:
        raise TenfoldError(
            f"{path}: no token ends a text: its vocabulary needs {END_OF_TEXT}, or the"
            " tokenizer_config.json beside it an eos_token"
        )
    return tokenizer.eos_token_id
