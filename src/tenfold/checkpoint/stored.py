"""A tensor as a file holds it, not read yet: what every reader (safetensors, GGUF) hands to the loader.

No torch is imported here: a file's header can be read without it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_BYTES = 4 << 20
"""How much of a tensor is in memory at once while it is read, counted in float32.

malloc keeps two or three such pieces after they are freed, so they stay small.
"""


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint, decoded to floating point as it is read."""

    name: str
    file: Path
    shape: tuple[int, ...]
    form: str
    """How the file writes it: a dtype (bfloat16) or a quantisation (mxfp4, Q4_K)."""
    num_bytes: int
    """In the file, scales included."""
    read: Callable[[int, int], "Tensor"]
    """Rows [start, stop) of the first axis, in a floating dtype, on the CPU, in memory of their own."""

    def whole(self) -> "Tensor":
        return self.read(0, self.shape[0])

    def pieces(self) -> Iterator[tuple[slice, "Tensor"]]:
        """All rows in order, a few at a time, so that little more than the result is ever in memory."""
        row_bytes = 4
        for size in self.shape[1:]:
            row_bytes *= size
        step = max(1, CHUNK_BYTES // max(1, row_bytes))
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            yield slice(start, stop), self.read(start, stop)
