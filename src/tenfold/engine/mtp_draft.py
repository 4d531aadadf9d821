"""Guesses by a model's own multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2).

Each costs one layer more. Its cache holds, at each position, what the module makes of the state there and of
the token after it: at the end of a prefix that sequences share maybe another's, which makes a guess a little
worse.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from tenfold.engine.batch import Chunk, Outcome
from tenfold.engine.block_pool import Places, places_of
from tenfold.model.decoder_layer import DecoderLayer
from tenfold.model.mtp import MultiTokenPrediction

if TYPE_CHECKING:
    from tenfold.engine.torch_batch import TorchBatchRunner


class MTPDrafter:
    """The module, and the pool of the runner's blocks that is its cache."""

    def __init__(self, runner: "TorchBatchRunner"):
        self._runner, self._pool = runner, runner.new_pool()
        (module,) = runner.model.mtp
        self._module = cast(MultiTokenPrediction, module)
        self._layer = cast(DecoderLayer, module.layer)
        self._window = runner.config.window(runner.config.num_hidden_layers - 1)

    def draft(
        self, chunks: Sequence[Chunk], outcomes: Sequence[Outcome], states_1TD: Tensor
    ) -> Sequence[int | None]:
        """As `Pass.draft`. `states_1TD` are those of all the chunks' tokens, as `logits` takes them."""
        guesses: list[int | None] = [None] * len(chunks)
        ends = list(accumulate(outcome.kept for outcome in outcomes))
        if ends[-1] == 0:
            return guesses
        x_1TD, places = self._read(chunks, outcomes, states_1TD)
        query = self._pool.write(self._layer, x_1TD, places)
        asked = [n for n, outcome in enumerate(outcomes) if outcome.kept and outcome.guess]
        if asked:
            rows = [ends[n] - 1 for n in asked]
            lasts = [
                chunks[n]._replace(start=chunks[n].start + outcomes[n].kept - 1, ids=[outcomes[n].next_id])
                for n in asked
            ]
            tokens = self._predict(x_1TD[:, rows], query[:, :, rows], self._places(lasts, [self._window]))
            for n, token in zip(asked, tokens, strict=True):
                guesses[n] = token
        return guesses

    def _read(
        self, chunks: Sequence[Chunk], outcomes: Sequence[Outcome], states_1TD: Tensor
    ) -> tuple[Tensor, Places]:
        """What the layer takes of the tokens that were kept, and where that is."""
        rows, kept_chunks, first = list[int](), list[Chunk](), 0
        for chunk, (kept, next_id, _) in zip(chunks, outcomes, strict=True):
            if kept:
                rows += range(first, first + kept)
                kept_chunks.append(chunk._replace(ids=[*chunk.ids[1:kept], next_id]))
            first += len(chunk.ids)
        ids = torch.tensor([[token for chunk in kept_chunks for token in chunk.ids]])
        next_1TD = self._runner.model.embed(ids.to(self._runner.device))
        return self._module.combine(states_1TD[:, rows], next_1TD), self._places(kept_chunks, [])

    def _places(self, chunks: Sequence[Chunk], windows: list[int | None]) -> Places:
        runner = self._runner
        return places_of(chunks, runner.config, runner.block_size, windows, runner.device)

    def _predict(self, x_1ND: Tensor, query: Tensor, places: Places) -> list[int]:
        x_1ND = self._pool.read(self._layer, x_1ND, query, places, self._window)
        x_1ND, _ = self._layer.feed_forward(x_1ND)
        tokens: list[int] = self._runner.model.logits(self._module.norm(x_1ND[0])).argmax(-1).tolist()
        return tokens
