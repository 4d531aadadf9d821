"""A checkpoint of any family read as our model's tensors, a few rows at a time.

Slots say which view of our tensor a file's tensor fills. Here they are turned round: from the view's place
in memory follows which rows of the file hold given rows of ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from tenfold.checkpoint.opening import Checkpoint
from tenfold.checkpoint.slot import Slot
from tenfold.checkpoint.store import copy, own_tensors, unallocated
from tenfold.checkpoint.stored import Stored
from tenfold.errors import TenfoldError
from tenfold.panels import PANEL_ROWS

PIECE_BYTES = 32 << 20
"""Of a matrix in float32 that are in memory at once."""


@dataclass(frozen=True)
class _Filling:
    """A file's tensor and the view of ours, (rows, ...), that it fills."""

    stored: Stored
    slot: Slot
    view: Tensor
    """On the meta device."""
    row: int
    """Elements in a row of ours."""

    @property
    def row_by_row(self) -> bool:
        """Whether each row of the file is one row of ours, or a part of one."""
        in_row = self.view.storage_offset() % self.row + _extent(self.view[0])
        return self.view.stride(0) == self.row and in_row <= self.row

    @property
    def first(self) -> int:
        return self.view.storage_offset() // self.row

    @property
    def last(self) -> int:
        """One more than the last row of ours in which it has a part."""
        return (self.view.storage_offset() + _extent(self.view) - 1) // self.row + 1

    def fill(self, out: Tensor, start: int, stop: int) -> None:
        """What it has of rows [start, stop) of ours, into `out`."""
        low, high = max(start, self.first), min(stop, self.last)
        if low >= high:
            return
        shape, at = list(self.view.shape), self.view.storage_offset() - start * self.row
        if self.row_by_row:
            shape[0], at = high - low, at + (low - self.first) * self.row
            target = out.as_strided(shape, self.view.stride(), at)
            target.copy_(self.stored.read(low - self.first, high - self.first).view(shape))
        else:
            assert (low, high) == (self.first, self.last), f"{self.stored.name} is not read in pieces"
            copy(self.stored, self.slot, out.as_strided(shape, self.view.stride(), at))


@dataclass(frozen=True)
class OwnTensor:
    """One of our model's tensors, not read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    """bfloat16 where every file's tensor in it is, else float32."""
    fillings: list[_Filling]

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) in float32."""
        out = torch.empty((stop - start, *self.shape[1:]))
        for filling in self.fillings:
            filling.fill(out, start, stop)
        return out

    def whole(self) -> Tensor:
        return self.read(0, self.shape[0])

    def pieces(self) -> Iterator[Tensor]:
        """All rows in order, whole panels of a matrix at a time where the files allow it."""
        step = self.shape[0]
        if all(filling.row_by_row for filling in self.fillings):
            step = max(1, PIECE_BYTES // (4 * PANEL_ROWS * prod(self.shape[1:]))) * PANEL_ROWS
        for start in range(0, self.shape[0], step):
            yield self.read(start, min(start + step, self.shape[0]))


def read_as_ours(checkpoint: Checkpoint) -> dict[str, OwnTensor]:
    """By the names of our model's state_dict, those that share a tensor once.

    Reading raises TenfoldError naming the file's tensor that holds NaN, infinity or a larger number than
    any format does.
    """
    ours = own_tensors(unallocated(checkpoint))
    fillings: dict[str, list[_Filling]] = {name: [] for name in ours}
    for name, stored in checkpoint.tensors.items():
        slot = checkpoint.slots[name]
        if not slot.is_copy:
            whole = ours[slot.name]
            filling = _Filling(_finite(stored), slot, slot.view(whole), whole.stride(0))
            fillings[slot.name].append(filling)
    return {
        name: OwnTensor(tuple(tensor.shape), _dtype(fillings[name]), fillings[name])
        for name, tensor in ours.items()
    }


def _dtype(fillings: list[_Filling]) -> torch.dtype:
    forms = {filling.stored.form for filling in fillings}
    return torch.bfloat16 if forms == {"bfloat16"} else torch.float32


def _finite(stored: Stored) -> Stored:
    def read(start: int, stop: int) -> Tensor:
        piece = stored.read(start, stop).float()
        if not bool((piece.abs() < 2.0**127).all()):
            raise TenfoldError(
                f"{stored.file}: tensor {stored.name} holds NaN, infinity or a number of 2^127 or more,"
                " which cannot be packed"
            )
        return piece

    return replace(stored, read=read)


def _extent(view: Tensor) -> int:
    """Elements of memory from a view's first to its last."""
    return 1 + sum((size - 1) * step for size, step in zip(view.shape, view.stride(), strict=True))
