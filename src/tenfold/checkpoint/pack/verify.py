"""Are a packed model's bytes those that were written?"""

import re
import zlib
from pathlib import Path

import torch

from tenfold.checkpoint.pack.layout import Experts
from tenfold.checkpoint.pack.opened import Found, find_parts, packed_config
from tenfold.checkpoint.raw import RawTensor
from tenfold.checkpoint.stored import CHUNK_BYTES
from tenfold.checkpoint.weights import list_raw
from tenfold.errors import TenfoldError
from tenfold.hub import resolve


def verify(path_or_id: str | Path) -> dict[str, int]:
    """Read everything, and count the tensors and bytes whose checksum is right.

    Raises TenfoldError naming the file, the layer and the expert (or the tensor) of the first that is not.
    """
    directory = resolve(path_or_id)
    config_json = directory / "config.json"
    _, parts = packed_config(config_json)
    found = find_parts(list_raw(directory), parts, config_json)
    for there in found:
        _verify(there)
    raws = [raw for there in found for raw in there.raws]
    return {"tensors": len(raws), "bytes": sum(raw.num_bytes for raw in raws)}


def _verify(found: Found) -> None:
    for expert, raw in enumerate(found.raws):
        written, there = written_checksum(raw), _checksum(raw)
        if written != there:
            what = f"tensor {raw.name}"
            if isinstance(found.part, Experts):
                what = f"layer {raw.name.split('.')[1]}, expert {expert}"
            raise TenfoldError(f"{raw.file}: {damaged(what, there, written)}")


def written_checksum(raw: RawTensor) -> int:
    """The CRC-32 that a packed file says a tensor has. TenfoldError if it says none."""
    written = raw.note.rpartition(" ")[2]
    if not re.fullmatch("[0-9a-f]{8}", written):
        raise TenfoldError(
            f"{raw.file}: tensor {raw.name} has {written:.50} for a CRC-32; pack the model again"
        )
    return int(written, 16)


def damaged(what: str, there: int, written: int) -> str:
    """csrc/readers.cpp says it in the same words."""
    return (
        f"{what} is damaged: its bytes have the CRC-32 {there:08x}, not {written:08x}; pack the model again"
    )


def _checksum(raw: RawTensor) -> int:
    checksum, rows = 0, raw.shape[0]
    step = max(1, CHUNK_BYTES * rows // raw.num_bytes)
    for start in range(0, rows, step):
        data = raw.read(start, min(start + step, rows))
        checksum = zlib.crc32(data.flatten().view(torch.uint8).numpy().data, checksum)
    return checksum
