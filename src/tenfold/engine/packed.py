"""Running a packed model alone: the prompt in pieces, then token by token."""

import torch
from torch import Tensor

from tenfold.engine.batch import Chunk
from tenfold.engine.packed_batch import BLOCK_SIZE, PackedBatchRunner, PackedPass
from tenfold.errors import TenfoldError
from tenfold.packed import PackedModel

PIECE = 1024
"""Tokens of all sequences together that go through the layers at once, which bounds the memory they take."""


class PackedRunner:
    """`batch` sequences of equal length, for `capacity` positions or a few more."""

    def __init__(self, model: PackedModel, batch: int, capacity: int):
        blocks = -(-capacity // BLOCK_SIZE)
        self.config, self.batch, self.capacity = model.config, batch, blocks * BLOCK_SIZE
        self.runner = PackedBatchRunner(model, batch * blocks, max(PIECE, batch), self.capacity)
        self._blocks = [range(first, first + blocks) for first in range(0, batch * blocks, blocks)]
        self.length = 0

    def reset(self) -> None:
        """Forget all positions."""
        used = -(-self.length // BLOCK_SIZE)
        self.runner.clear([block for blocks in self._blocks for block in blocks[:used]])
        self.length = 0

    @torch.inference_mode()
    def forward(self, ids_BS: Tensor) -> Tensor:
        """Logits (B, V) after the last of the new tokens, which the caches then hold.

        Raises TenfoldError for ids that are no tokens, and for more of them than there is room for.
        """
        if ids_BS.ndim != 2 or len(ids_BS) != self.batch or not ids_BS.numel():
            raise TenfoldError(f"token ids of shape {tuple(ids_BS.shape)} must be ({self.batch}, 1 or more)")
        if (length := self.length + ids_BS.shape[1]) > self.capacity:
            raise TenfoldError(f"{length} positions are more than the {self.capacity} there is room for")
        ids, piece = ids_BS.tolist(), max(1, PIECE // self.batch)
        last = (ids_BS.shape[1] - 1) // piece * piece
        for first in range(0, last, piece):
            self._advance([row[first : first + piece] for row in ids], 0)
        return self._advance([row[last:] for row in ids], 1)

    def _advance(self, ids: list[list[int]], wanted: int) -> Tensor:
        """Logits of the `wanted` last tokens of each sequence."""
        passed = self.runner.begin(
            [Chunk(blocks, self.length, row, wanted) for blocks, row in zip(self._blocks, ids, strict=True)]
        )
        self.run(passed)
        self.length += len(ids[0])
        return passed.logits()

    def run(self, passed: PackedPass) -> None:
        """All layers."""
        passed.advance()
