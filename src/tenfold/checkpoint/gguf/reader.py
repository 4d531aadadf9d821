"""GGUF files: their metadata, and their tensors as `Stored`, decoded as they are read.

Tensor bytes are read, not mapped: the pages of a mapped file would count as memory of ours.
"""

import os
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.checkpoint.gguf.header import Header, TensorInfo
from tenfold.checkpoint.stored import Stored
from tenfold.errors import TenfoldError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType
    from torch import Tensor

ALIGNMENT = 32  # where `general.alignment` is absent
DECODED_AT_ONCE = 1 << 20
"""Weights decoded in one call, whose working memory is several times its result."""


@dataclass(frozen=True)
class GGUF:
    """One model, of one file or of all its parts."""

    path: Path
    metadata: dict[str, Any]
    """Every key-value, arrays as lists."""
    tensors: dict[str, Stored]


def open_gguf(path: str | Path) -> GGUF:
    """A GGUF file's metadata, and its tensors, none of them read yet.

    For a part of a split model (`NAME-00001-of-00003.gguf`), the whole model. Raises TenfoldError
    naming the file for anything that is not valid, or not there.
    """
    path = Path(path)
    part = _open_part(path)
    parts = part.metadata.get("split.count", 1)
    if parts in (0, 1):
        return part
    return _join(path, [_open_part(sibling) for sibling in _siblings(path, parts)])


def _siblings(path: Path, parts: object) -> list[Path]:
    """All the files of a split model, which are named for their number."""
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name, re.DOTALL)
    if match is None or int(match[3]) != parts:
        raise TenfoldError(
            f"{path}: it is one of {reprlib.repr(parts)} parts of a split model, so it must be called"
            " NAME-00001-of-0000N.gguf, with the other parts beside it"
        )
    files = [path.with_name(f"{match[1]}-{n:05d}-of-{match[3]}.gguf") for n in range(1, int(match[3]) + 1)]
    for file in files:
        if not file.is_file():
            raise TenfoldError(f"{file}: no such file, and {path.name} is a part of the same split model")
    return files


def _join(path: Path, parts: list[GGUF]) -> GGUF:
    """Metadata are the first part's, which alone has them all."""
    tensors: dict[str, Stored] = {}
    for number, part in enumerate(parts):
        if (part.metadata.get("split.no"), part.metadata.get("split.count")) != (number, len(parts)):
            raise TenfoldError(f"{part.path}: it does not say that it is part {number + 1} of {len(parts)}")
        for name, stored in part.tensors.items():
            if name in tensors:
                raise TenfoldError(f"{part.path}: tensor {name} is in {tensors[name].file.name} too")
            tensors[name] = stored
    return GGUF(path, parts[0].metadata, tensors)


def _open_part(path: Path) -> GGUF:
    try:
        with path.open("rb") as file:
            header = Header(file, path)
            tensor_count, key_count = header.begin()
            metadata = header.key_values(key_count)
            infos = [header.tensor_info() for _ in range(tensor_count)]
    except FileNotFoundError:
        raise TenfoldError(f"{path}: no such file") from None
    except OSError as error:
        raise TenfoldError(f"{path}: cannot be read ({error.strerror or error})") from None
    return GGUF(path, metadata, _place(header, metadata, infos))


def _place(header: Header, metadata: dict[str, Any], infos: list[TensorInfo]) -> dict[str, Stored]:
    """Where each tensor's bytes are, once it is sure that they are there and no other tensor's."""
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        header.fail(f"general.alignment {reprlib.repr(alignment)} is not a power of two")
    start = -(-header.at // alignment) * alignment
    tensors: dict[str, Stored] = {}
    end = 0
    for info in sorted(infos, key=lambda info: info.offset):
        kind, size = _layout(header, info)
        if info.name in tensors:
            header.fail(f"tensor {info.name} is there twice")
        if info.offset % alignment:
            header.fail(f"tensor {info.name} is at {info.offset}, no multiple of {alignment}")
        if info.offset < end:
            header.fail(f"tensor {info.name} overlaps the one before it")
        end = info.offset + size
        if start + end > header.size:
            header.fail(f"tensor {info.name} ends at {start + end:,} of {header.size:,} bytes")
        read = _reader(header.path, info, kind, start + info.offset)
        tensors[info.name] = Stored(info.name, header.path, info.shape, kind.name, size, read)
    return tensors


def _layout(header: Header, info: TensorInfo) -> tuple["GGMLQuantizationType", int]:
    """How a tensor is quantised, and its bytes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(info.type)
    except ValueError:
        header.fail(f"tensor {info.name} has the unknown type {info.type}")
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if info.shape[-1] % block:
        header.fail(f"tensor {info.name} has rows of {info.shape[-1]}, and {kind.name} blocks of {block}")
    return kind, prod(info.shape) // block * block_bytes


def _reader(
    path: Path, info: TensorInfo, kind: "GGMLQuantizationType", begin: int
) -> Callable[[int, int], "Tensor"]:
    from gguf import GGML_QUANT_SIZES

    block, block_bytes = GGML_QUANT_SIZES[kind]
    row = prod(info.shape[1:])

    def read(start: int, stop: int) -> "Tensor":
        import torch

        # A row of a vector is one weight, and only whole blocks can be decoded.
        first, last = start * row // block, -(-stop * row // block)
        out = torch.empty((last - first) * block)
        step = max(1, DECODED_AT_ONCE // block)
        with path.open("rb") as file:
            for at in range(first, last, step):
                size = min(step, last - at) * block_bytes
                data = os.pread(file.fileno(), size, begin + at * block_bytes)
                if len(data) < size:
                    raise TenfoldError(f"{path}: it ends within tensor {info.name}")
                out[(at - first) * block :][: size // block_bytes * block] = _decode(data, kind, path, info)
        skipped = start * row - first * block
        return out[skipped:][: (stop - start) * row].view(stop - start, *info.shape[1:])

    return read


def _decode(data: bytes, kind: "GGMLQuantizationType", path: Path, info: TensorInfo) -> "Tensor":
    """Whole blocks as float32."""
    import gguf
    import numpy as np
    import torch

    try:
        with np.errstate(all="ignore"):  # whatever the bytes of a damaged file decode to
            return torch.from_numpy(gguf.dequantize(np.frombuffer(bytearray(data), np.uint8), kind))
    except NotImplementedError:
        raise TenfoldError(f"{path}: tensor {info.name} is {kind.name}, which cannot be decoded") from None
