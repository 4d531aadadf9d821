"""One safetensors file of a packed model, written as its tensors are made, with a checksum of each."""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tenfold.checkpoint import safetensors
from tenfold.checkpoint.pack.record import PAGE

_DTYPES = safetensors.DTYPES | {torch.uint8: "U8"}


class Entry(NamedTuple):
    """A tensor to write."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    label: str
    """What it is, which the file's metadata say before its checksum."""
    chunks: Callable[[], Iterable[Tensor]]
    """Its bytes in order, made when they are written; zeros follow where they are too few."""

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """What is packed first, each a number of pages; then the widest, so that all elements are aligned."""
    return sorted(entries, key=lambda entry: (entry.dtype != torch.uint8, -entry.dtype.itemsize))


def write_shard(path: Path, entries: list[Entry], advance: Callable[[int], None]) -> None:
    """Under another name until it is whole. `advance` is told of bytes as they are written.

    Raises OSError where the system refuses.
    """
    temporary = path.with_suffix(".part")
    checksums = [0] * len(entries)
    try:
        with temporary.open("wb") as file:
            file.write(_header(entries, checksums))
            for number, entry in enumerate(entries):
                for chunk in _padded(entry):
                    file.write(chunk)
                    checksums[number] = zlib.crc32(chunk, checksums[number])
                    advance(len(chunk))
            file.seek(0)
            file.write(_header(entries, checksums))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _padded(entry: Entry) -> Iterator[memoryview]:
    left = entry.num_bytes
    for chunk in entry.chunks():
        data = chunk.contiguous().flatten().view(torch.uint8).numpy().data
        left -= len(data)
        yield data
    assert left >= 0, f"{entry.name} has more bytes than its shape"
    yield memoryview(bytes(left))


def _header(entries: list[Entry], checksums: list[int]) -> bytes:
    """As long with any checksums, so that they can be filled in; tensors begin at a page."""
    notes = {e.name: f"{e.label} {crc:08x}" for e, crc in zip(entries, checksums, strict=True)}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **notes}}
    start = 0
    for entry in entries:
        end = start + entry.num_bytes
        dtype = _DTYPES[entry.dtype]
        header[entry.name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return len(text).to_bytes(8, "little") + text
