"""A packed directory, described and checked but not read."""

from pathlib import Path
from typing import NamedTuple

import torch

from tenfold.checkpoint import read_config, read_object
from tenfold.checkpoint.pack.layout import Experts, Part, Plain, parts_by_file
from tenfold.checkpoint.pack.record import PAGE
from tenfold.checkpoint.raw import RawTensor
from tenfold.config import ModelConfig
from tenfold.errors import TenfoldError
from tenfold.formats import packing_of
from tenfold.switch_config import decoder_only

PLAIN_DTYPES = (torch.float32, torch.bfloat16)


class Found(NamedTuple):
    """A part and the file's tensors that hold it: of experts one each, in order and contiguous."""

    part: Part
    raws: list[RawTensor]


def packed_config(config_json: Path) -> tuple[ModelConfig, list[Part]]:
    """A packed model's config, and the parts that it calls for. TenfoldError if it is not packed."""
    source = str(config_json)
    packing = packing_of(read_object(config_json), source) if config_json.is_file() else None
    if packing is None:
        raise TenfoldError(f"{config_json.parent} is no packed model; `tenfold pack` makes one")
    config = decoder_only(read_config(config_json)[1], source)
    return config, [part for file in parts_by_file(config, packing) for part in file]


def find_parts(raws: dict[str, RawTensor], parts: list[Part], config_json: Path) -> list[Found]:
    """The parts that `packed_config` calls for, among the tensors of a packed model's files.

    Raises TenfoldError naming the tensor that is missing, left over, misplaced, or packed for another
    config than `config_json`.
    """
    left = dict(raws)
    found = []
    for part in parts:
        for name in part.stored:
            if name not in left:
                raise TenfoldError(f"tensor {name} is missing, which {config_json} calls for")
        found.append(Found(part, [left.pop(name) for name in part.stored]))
        _check(*found[-1], config_json)
    for name, raw in left.items():
        raise TenfoldError(f"{raw.file}: tensor {name} has no place in {config_json}")
    return found


def _check(part: Part, raws: list[RawTensor], config_json: Path) -> None:
    first = raws[0]
    for number, raw in enumerate(raws):
        tensor = f"{raw.file}: tensor {raw.name}"
        label = raw.note.rpartition(" ")[0]
        if label != part.label:
            packed = f"is packed as {label:.50}" if label else "does not say how it is packed"
            raise TenfoldError(f"{tensor} {packed}, not as {part.label}, which {config_json} calls for")
        dtypes = PLAIN_DTYPES if isinstance(part, Plain) else (torch.uint8,)
        if raw.dtype not in dtypes or raw.shape != part.stored[raw.name]:
            raise TenfoldError(f"{tensor} is {raw.dtype} of shape {raw.shape}, no {part.label}")
        alignment = raw.dtype.itemsize if isinstance(part, Plain) else PAGE
        if raw.offset % alignment:
            raise TenfoldError(f"{tensor} begins at byte {raw.offset:,}, no multiple of {alignment:,}")
        if isinstance(part, Experts):
            expected = first.offset + number * part.record_bytes
            if (raw.file, raw.offset) != (first.file, expected):
                raise TenfoldError(f"{tensor} does not follow the expert before it")
