"""Where a file's tensor goes in a model. No torch is imported here: families only describe."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Index = tuple[int | slice, ...]
"""Selects a part of a tensor."""


def _whole(tensor: "Tensor") -> "Tensor":
    return tensor


@dataclass(frozen=True)
class Slot:
    """A file's tensor as a view of one of the model's, so that loading and saving are one copy."""

    name: str
    """Of the model's tensor, as in its state_dict."""
    view: Callable[["Tensor"], "Tensor"] = _whole
    """From the model's tensor to a view that shares its memory and has the file's layout."""
    merged: int | None = None
    """The first of the neighbouring axes of that view that the file holds as one."""
    merged_axes: int = 2
    """How many those are."""
    is_copy: bool = False
    """Written for other engines, and not needed when read: the model holds it once already."""

    def shape(self, view: "Tensor") -> tuple[int, ...]:
        """The file's shape of that view."""
        if self.merged is None:
            return tuple(view.shape)
        at, end = self.merged, self.merged + self.merged_axes
        return (*view.shape[:at], prod(view.shape[at:end]), *view.shape[end:])


SlotMap = dict[str, Slot]
"""A file's tensor name -> its place."""


def part(*index: int | slice) -> Callable[["Tensor"], "Tensor"]:
    """The view of some rows, of one expert, …"""
    return lambda tensor: tensor[index]
