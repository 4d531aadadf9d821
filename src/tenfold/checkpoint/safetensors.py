"""The safetensors format: files listed and read one tensor at a time, directories written.

The library maps files, so that their pages count as memory of ours, and its writer makes a second
copy of a whole file; the format is simple enough to stream, and strict enough to check:
https://github.com/huggingface/safetensors#format
"""

import json
import os
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import torch
from torch import Tensor

from tenfold.checkpoint.raw import RawTensor
from tenfold.errors import TenfoldError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 4_000_000_000
MAX_HEADER_BYTES = 25_000_000
"""A quarter of what the library allows, and 200,000 tensors: JSON takes twenty times its length to parse."""
MAX_NAME, MAX_AXES = 1000, 64
"""Far more than any tensor has, and few enough for arithmetic and messages."""

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""What is written."""

READ_DTYPES = {name: dtype for dtype, name in DTYPES.items()} | {
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


class _Span(NamedTuple):
    """One entry of a header: a tensor's place among the bytes that follow it."""

    start: int
    end: int
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def list_file(path: Path) -> dict[str, RawTensor]:
    """Every tensor of a file, none of it read yet.

    Raises TenfoldError for anything the format does not allow: bytes that no tensor or two tensors
    claim, a shape and dtype that do not make a tensor's length, names that are there twice.
    """
    try:
        with path.open("rb") as file:
            if hasattr(os, "posix_fadvise"):  # what is read ahead of a header would stay in the page cache
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            spans, data, metadata = _read_header(file, path)
    except OSError as error:
        raise TenfoldError(f"{path}: cannot read it: {error.strerror or error}") from None
    tensors = {}
    for span in spans:
        offset, note = data + span.start, metadata.get(span.name, "")
        read = _reader(path, offset, span)
        tensors[span.name] = RawTensor(span.name, path, span.dtype, span.shape, read, offset, note)
    return tensors


def _read_header(file: BinaryIO, path: Path) -> tuple[list[_Span], int, dict[str, str]]:
    """Entries in the order of their bytes, where those begin in the file, and its metadata."""
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        _refuse(path, f"it has {size:,} bytes, fewer than its header takes")
    if length > MAX_HEADER_BYTES:
        _refuse(path, f"its header is of {length:,} bytes, more than {MAX_HEADER_BYTES:,}")
    try:
        header = _parse(file.read(length).decode())
    except (ValueError, RecursionError) as error:
        _refuse(path, f"its header is not JSON as the format has it ({error})")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(path, "__metadata__ in its header must hold nothing but texts")
    spans = sorted(_span(path, name, entry) for name, entry in header.items())
    _check_layout(path, spans, size - 8 - length)
    return spans, 8 + length, metadata


def _parse(text: str) -> dict[str, Any]:
    """JSON, without the liberties that Python's parser takes."""
    if not text.startswith("{"):
        raise ValueError("it does not begin with {")
    header: dict[str, Any] = json.loads(
        text, object_pairs_hook=_unique, parse_int=_size, parse_float=_no_number, parse_constant=_no_number
    )
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name is there twice")
    return fields


def _size(digits: str) -> int:
    if digits.startswith("-") or len(digits) > 18:
        _no_number(digits)
    return int(digits)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:20]} is no size")


def _span(path: Path, name: str, entry: Any) -> _Span:
    """An entry whose fields agree with each other."""
    if not name.isprintable() or len(name) > MAX_NAME:
        _refuse(path, f"a tensor's name does not print or is too long: {name!r:.50}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"tensor {name} must have dtype, shape and data_offsets in its header, and no more")
    if entry["dtype"] not in list(READ_DTYPES):
        _refuse(path, f"tensor {name} has dtype {entry['dtype']!r:.50}, not {', '.join(READ_DTYPES)}")
    for field in ("shape", "data_offsets"):
        sizes = entry[field]
        if not isinstance(sizes, list) or len(sizes) > MAX_AXES or any(type(n) is not int for n in sizes):
            _refuse(path, f"{field} of tensor {name} must be a list of at most {MAX_AXES} whole numbers")
    if len(entry["data_offsets"]) != 2:
        _refuse(path, f"data_offsets of tensor {name} must be two: its first byte and the one after its last")
    (start, end), shape = entry["data_offsets"], tuple(entry["shape"])
    dtype = READ_DTYPES[entry["dtype"]]
    if prod(max(1, size) for size in shape) * dtype.itemsize >= 2**63:
        _refuse(path, f"tensor {name} of shape {shape} is larger than any")
    if end - start != prod(shape) * dtype.itemsize:
        _refuse(path, f"tensor {name} of shape {shape} and dtype {entry['dtype']} has {end - start:,} bytes")
    return _Span(start, end, name, dtype, shape)


def _check_layout(path: Path, spans: list[_Span], size: int) -> None:
    """Every byte belongs to one tensor."""
    at = 0
    for span in spans:
        if span.start != at:
            found = "overlaps the tensor before it" if span.start < at else "leaves a hole before it"
            _refuse(path, f"tensor {span.name} {found}: it starts at byte {span.start:,}, not {at:,}")
        at = span.end
    if at != size:
        _refuse(path, f"its tensors take {at:,} bytes, and {size:,} are there")


def _reader(path: Path, at: int, span: _Span) -> Callable[[int, int], Tensor]:
    row_bytes = prod(span.shape[1:]) * span.dtype.itemsize

    def read(start: int, stop: int) -> Tensor:
        buffer = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(at + start * row_bytes)
                _fill(file, buffer, path)
        except OSError as error:
            raise TenfoldError(f"{path}: cannot read it: {error.strerror or error}") from None
        rows = (stop - start,) if span.shape else ()
        return buffer.view(span.dtype).view((*rows, *span.shape[1:]))

    return read


def _fill(file: Any, buffer: Tensor, path: Path) -> None:
    left = buffer.numpy().data
    while left:
        count = file.readinto(left)
        if not count:
            _refuse(path, "it ends before its tensors do")
        left = left[count:]


def _refuse(path: Path, problem: str) -> NoReturn:
    raise TenfoldError(f"{path}: not a whole safetensors file: {problem}")


class Entry(NamedTuple):
    """A tensor to write (views are fine), and the shape and dtype to write it as."""

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.tensor.numel() * self.dtype.itemsize


def write_tensors(directory: Path, entries: Iterable[Entry], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write one file, or numbered shards and their index where one would pass `max_shard_bytes`."""
    shards = _shards(entries, max_shard_bytes)
    if len(shards) == 1:
        _write_file(directory / SINGLE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / name, shard)
        weight_map |= {entry.name: name for entry in shard}
    total = sum(entry.num_bytes for shard in shards for entry in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(entries: Iterable[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    """Entries in order, cut so that no shard but one of a single tensor passes the limit."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    return shards


def _write_file(path: Path, entries: list[Entry]) -> None:
    # Widest first, so that every tensor starts at a multiple of its element size.
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor, shape, dtype in entries:
        end = start + tensor.numel() * dtype.itemsize
        header[name] = {
            "dtype": DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor, _, dtype in entries:
            flat = tensor.detach().to("cpu", dtype).contiguous().flatten()
            file.write(flat.view(torch.uint8).numpy().data)
