"""A tensor as its file writes it down, before it is decoded: what the readers of containers hand on."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class RawTensor:
    """One tensor of a file, not read yet and perhaps only a part of a quantised weight."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]
    """Rows [start, stop) of the first axis, in `dtype`; a scalar is one row."""
    offset: int = 0
    """Of its first byte in a file that holds tensors as they are (safetensors)."""
    note: str = ""
    """What such a file's metadata say under the tensor's name."""

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize
