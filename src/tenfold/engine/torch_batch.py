"""A model of floating-point weights, wherever it lies, that many sequences go through together.

Norms, projections and experts see all tokens of a pass at once, so that an expert is read once a step;
attention sees them a sequence, or some of one size, at a time.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from tenfold.engine.batch import Chunk, Outcome, check
from tenfold.engine.block_pool import BlockPool, places_of
from tenfold.engine.mtp_draft import MTPDrafter
from tenfold.model.decoder_layer import DecoderLayer
from tenfold.model.transformer import Transformer


class TorchBatchRunner:
    """A `BatchRunner`. Numbers are the same whatever else is in a pass but for the rounding of the products,
    which are cut differently for other numbers of tokens."""

    def __init__(self, model: Transformer, num_blocks: int, block_size: int, max_tokens: int):
        model.config.check_generates()
        self.model, self.config = model, model.config
        self.num_blocks, self.block_size, self.max_tokens = num_blocks, block_size, max_tokens
        self.device = model.embed_tokens.weight.device
        self.pools = [self.new_pool() for _ in model.layers]
        self.drafter = MTPDrafter(self) if model.mtp else None

    def new_pool(self) -> BlockPool:
        """For one layer."""
        positions = self.num_blocks * self.block_size
        return BlockPool(self.config, positions, self.model.embed_tokens.weight.dtype, self.device)

    @torch.inference_mode()
    def begin(self, chunks: Sequence[Chunk]) -> "TorchPass":
        check(chunks, self)
        return TorchPass(self, chunks)

    def clear(self, blocks: Sequence[int]) -> None:
        """Nothing to do: no position is read before it is written."""


class TorchPass:
    """A `Pass`."""

    def __init__(self, runner: TorchBatchRunner, chunks: Sequence[Chunk]):
        self._chunks, self._runner, self._model = chunks, runner, runner.model
        config, device = runner.config, runner.device
        self._windows = [config.window(n) for n in range(config.num_hidden_layers)]
        self._places = places_of(chunks, config, runner.block_size, set(self._windows), device)
        ids = [token for chunk in chunks for token in chunk.ids]
        self._x_1TD = self._model.embed(torch.tensor([ids]).to(device))
        wanted = [n >= len(chunk.ids) - chunk.wanted for chunk in chunks for n in range(len(chunk.ids))]
        wanted_N = torch.tensor(wanted).nonzero().flatten().to(device)
        every_T = torch.arange(len(ids), device=device)
        # Of all tokens, those that go through the last feed-forward: a drafter looks at every state.
        self._through = every_T if runner.drafter else wanted_N
        # Of those, the ones that are wanted.
        self._wanted_N = wanted_N if runner.drafter else every_T[: len(wanted_N)]
        self._done = 0
        self.routes: Sequence[Tensor] = ()

    @torch.inference_mode()
    def advance(self, layers: int | None = None) -> bool:
        total = len(self._windows)
        until = total if layers is None else min(total, self._done + layers)
        for n in range(self._done, until):
            self._run(n)
        self._done = until
        return until == total

    def _run(self, n: int) -> None:
        layer, pool = cast(DecoderLayer, self._model.layers[n]), self._runner.pools[n]
        x_1TD = pool.attend(layer, self._x_1TD, self._places, self._windows[n])
        is_last = n == len(self._windows) - 1
        self._x_1TD, aux = layer.feed_forward(x_1TD[:, self._through] if is_last else x_1TD)
        if aux is not None:
            ids_TK = aux.expert_ids_TK.int()
            self.routes = (*self.routes, ids_TK[self._wanted_N] if is_last else ids_TK)

    @torch.inference_mode()
    def logits(self) -> Tensor:
        return self._model.logits(self._model.norm(self._x_1TD[0, self._wanted_N])).float()

    @torch.inference_mode()
    def draft(self, outcomes: Sequence[Outcome]) -> Sequence[int | None]:
        if self._runner.drafter is None:
            return [None] * len(outcomes)
        return self._runner.drafter.draft(self._chunks, outcomes, self._model.norm(self._x_1TD))
