"""Which documents are held out: decided by content alone, so that it never changes with the order.

Two passes: the first keeps only each document's hash and size, the second hands out the texts.
"""

import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import Progress

from tenfold.errors import TenfoldError
from tenfold.train.corpus import read_documents

HELD_OUT_SHARE = 0.05
HELD_OUT_ENOUGH = 256 * 1024  # bytes; a steady loss needs no more, however large the corpus


@dataclass(frozen=True)
class Split:
    """What the first pass keeps: each distinct document's hash and bytes, and who is held out."""

    sizes: dict[bytes, int]
    held_out: frozenset[bytes]


def survey(sources: Sequence[str]) -> Split:
    """The first pass: raises TenfoldError for sources that cannot be read."""
    sizes: dict[bytes, int] = {}
    with progress_bar() as progress:
        task = progress.add_task("reading", total=None)
        for document in read_documents(sources):
            raw = document.text.encode()
            sizes[hashlib.sha256(raw).digest()] = len(raw)
            progress.advance(task)
    return Split(sizes, frozenset() if len(sizes) == 1 else _hold_out(sizes))


def _hold_out(sizes: dict[bytes, int]) -> frozenset[bytes]:
    """Documents in order of their hashes until there are enough bytes.

    One that would take more than half the corpus is passed over, so that a long book beside a
    few notes is trained on.
    """
    total = sum(sizes.values())
    enough = _held_out_bytes(total)
    held: set[bytes] = set()
    held_bytes = 0
    for digest in sorted(sizes):
        if held_bytes < enough and held_bytes + sizes[digest] <= total / 2:
            held.add(digest)
            held_bytes += sizes[digest]
    return frozenset(held)


def _held_out_bytes(total: int) -> int:
    return min(math.ceil(HELD_OUT_SHARE * total), HELD_OUT_ENOUGH)


def split_texts(sources: Sequence[str], split: Split) -> Iterator[tuple[bool, str]]:
    """(held out?, text) of every distinct document once; a lone document is cut in two."""
    seen: set[bytes] = set()
    for document in read_documents(sources):
        raw = document.text.encode()
        digest = hashlib.sha256(raw).digest()
        if digest not in split.sizes:
            raise TenfoldError(f"{document.name}: changed while it was being read; try again")
        if digest in seen:
            continue
        seen.add(digest)
        if len(split.sizes) == 1:
            at = _cut(raw, document.name)
            yield False, raw[:at].decode()
            yield True, raw[at:].decode()
        else:
            yield digest in split.held_out, document.text
    if len(seen) < len(split.sizes):
        raise TenfoldError(f"{', '.join(sources)}: changed while being read; try again")


def _cut(raw: bytes, name: str) -> int:
    """Where a lone document's held-out end begins: after a line end, else between characters."""
    at = len(raw) - _held_out_bytes(len(raw))
    line_end = raw.rfind(b"\n", len(raw) // 2, at)
    if line_end >= 0:
        return line_end + 1
    while at and raw[at] & 0xC0 == 0x80:  # inside a UTF-8 character
        at -= 1
    if not at:
        raise TenfoldError(
            f"{name}: one character cannot be split into training and validation text; give more"
        )
    return at


def progress_bar() -> Progress:
    """On stderr, and only for a person to see."""
    return Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
