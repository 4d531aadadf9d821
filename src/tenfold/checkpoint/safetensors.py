"""Reading and writing a directory's safetensors files one tensor at a time.

The library's own writer makes a second copy of a whole file in memory; the format is simple enough
to stream: https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tenfold.checkpoint import read_object
from tenfold.checkpoint.stored import Stored
from tenfold.errors import TenfoldError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 4_000_000_000

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Entry(NamedTuple):
    """A tensor to write (views are fine), and the shape and dtype to write it as."""

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.tensor.numel() * self.dtype.itemsize


def list_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of a model directory, none of it read yet."""
    single = directory / SINGLE
    if single.exists():
        return _list_file(single)
    if not (directory / INDEX).exists():
        raise TenfoldError(f"{directory}: no weights there; expected {SINGLE} or {INDEX}")
    owners = _read_index(directory)
    tensors: dict[str, Stored] = {}
    for path in sorted(set(owners.values())):
        there = _list_file(path)
        for name, owner in owners.items():
            if owner == path and name not in there:
                raise TenfoldError(f"{path}: tensor {name} is missing, though {INDEX} names it")
        tensors |= {name: stored for name, stored in there.items() if owners.get(name) == path}
    return tensors


def _list_file(path: Path) -> dict[str, Stored]:
    with _opened(path) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
    return {name: Stored(name, path, shape, _reader(path, name)) for name, shape in shapes.items()}


def _reader(path: Path, name: str) -> Callable[[int, int], Tensor]:
    def read(start: int, stop: int) -> Tensor:
        with _opened(path) as file:
            tensor: Tensor = file.get_slice(name)[start:stop]
        if tensor.dtype not in DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            given = str(tensor.dtype).removeprefix("torch.")
            raise TenfoldError(f"{path}: tensor {name} is {given}, not {known}")
        return tensor

    return read


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


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; what is wrong with it becomes a TenfoldError that names it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise TenfoldError(f"{path}: not a whole safetensors file: {error}") from None
    except OSError as error:
        raise TenfoldError(f"{path}: cannot read it: {error.strerror or error}") from None


def _read_index(directory: Path) -> dict[str, Path]:
    path = directory / INDEX
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise TenfoldError(f"{path}: field weight_map must map tensor names to files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise TenfoldError(f"{path}: tensor {name} must name a file beside it, not {file!r}")
        if not (directory / file).is_file():
            raise TenfoldError(f"{path}: tensor {name} is in {file}, which is not there")
    return {name: directory / file for name, file in weight_map.items()}
