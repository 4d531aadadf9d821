"""A packed model that many sequences go through together, in the compiled kernels."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenfold import compiled
from tenfold.device import keep_freed_memory
from tenfold.engine.batch import Chunk, Outcome, check
from tenfold.engine.kv_cache import cache_shape
from tenfold.engine.native_layers import NativeLayers
from tenfold.errors import TenfoldError
from tenfold.packed import PackedModel

BLOCK_SIZE = 64
"""Positions of a block of the cache: a multiple of 32 (csrc/attention.hpp)."""
WIDTH = 32
"""Head dimensions in the cache come in multiples of this."""
LINE = 64
"""Bytes of a line of the processor's caches: a vector that lies in two takes the time of two."""


class PackedBatchRunner:
    """A `BatchRunner`. Numbers are the same to the bit whatever else is in a pass, however a prompt was cut
    and whichever blocks it has."""

    def __init__(self, model: PackedModel, num_blocks: int, max_tokens: int, context: int):
        """`context` is the number of positions that a sequence may have."""
        config = model.config
        config.check_generates()
        keep_freed_memory()
        self.model, self.config = model, config
        self.block_size, self.num_blocks, self.max_tokens = BLOCK_SIZE, num_blocks, max_tokens
        self._context = context
        self.native = NativeLayers(config, model.weights, context)
        self.embedding = self.native.linear("embed_tokens")
        self._keys, self._values = ([self._new_cache() for _ in self.native.layers] for _ in "kv")
        self.decoder = compiled.module().Decoder(
            layers=self.native.layers,
            keys=[cache.ctypes.data for cache in self._keys],
            values=[cache.ctypes.data for cache in self._values],
            block_size=BLOCK_SIZE,
            head=self.embedding if config.tie_word_embeddings else self.native.linear("lm_head"),
            norm=self.native.address("norm.weight"),
            eps=config.rms_norm_eps,
        )

    def _new_cache(self) -> NDArray[np.uint16]:
        """Of keys or values, bf16 in the kernels' own layout, from a cache line on. Numpy's zeros take memory
        only as they are used, and numpy clears them in a fork too, where torch would wait for threads that
        are not there."""
        heads, width, _ = cache_shape(self.config)  # values are as wide as keys: a latent is both
        shape = (self.num_blocks, heads, BLOCK_SIZE * -(-width // WIDTH) * WIDTH)
        room = np.zeros(math.prod(shape) + LINE // 2, np.uint16)
        first = -room.ctypes.data % LINE // 2
        return room[first : first + math.prod(shape)].reshape(shape)

    @torch.inference_mode()
    def begin(self, chunks: Sequence[Chunk]) -> "PackedPass":
        check(chunks, self)
        self._check_context(chunks)
        return PackedPass(self, chunks)

    def _check_context(self, chunks: Sequence[Chunk]) -> None:
        """RoPE's tables go no further."""
        length = max(chunk.start + len(chunk.ids) for chunk in chunks)
        if length > self._context:
            raise TenfoldError(f"{length} positions are more than the context of {self._context}")

    def clear(self, blocks: Sequence[int]) -> None:
        """Values beyond the last position have no weight, but no weight times NaN is NaN."""
        for values in self._values:
            values[list(blocks)] = 0


class PackedPass:
    """A `Pass`. A layer's turn is the feed-forward of the layer before it and then its own attention; the
    last one's feed-forward follows for the tokens alone whose logits are wanted. In its attention, too, the
    others only leave keys and values, but where `all_rows` is set."""

    def __init__(self, runner: PackedBatchRunner, chunks: Sequence[Chunk]):
        config = runner.config
        self._runner, self._config = runner, config
        self._chunks = compiled.module().Chunks(chunks, runner.num_blocks)
        self.tokens: int = self._chunks.tokens
        self.x_TD = self._embed()
        layers, top_k = config.num_hidden_layers, config.num_experts_per_tok
        self._chosen = torch.empty(layers - 1, self.tokens, top_k, dtype=torch.int32)
        self._chosen_last = torch.empty(self._chunks.wanted, top_k, dtype=torch.int32)
        self._logits_NV = torch.empty(self._chunks.wanted, config.vocab_size)
        self.done, self.all_rows = 0, False

    def _embed(self) -> Tensor:
        x_TD = torch.empty(self.tokens, self._config.hidden_size)
        self._runner.embedding.rows(self._chunks.ids, self.tokens, x_TD.data_ptr())
        return x_TD if self._config.embedding_multiplier == 1 else x_TD * self._config.embedding_multiplier

    @property
    def routes(self) -> Sequence[Tensor]:
        sparse = self._config.sparse_layers
        chosen = [self._chosen[n] for n in sparse if n + 1 < self.done]
        ended = self.done == self._config.num_hidden_layers
        return [*chosen, self._chosen_last] if ended and sparse[-1:] == [self.done - 1] else chosen

    @torch.inference_mode()
    def advance(self, layers: int | None = None) -> bool:
        total = self._config.num_hidden_layers
        until = total if layers is None else min(total, self.done + layers)
        if self.done < until:
            self._run(until)
            self.done = until
            if until == total and (by := self._config.logits_scaling) != 1:
                self._logits_NV /= by
        return until == total

    def _run(self, until: int) -> None:
        """The turns of the layers before `until`, and what is left after the last one's."""
        x, chosen, top_k = self.x_TD.data_ptr(), self._chosen.data_ptr(), self._config.num_experts_per_tok
        last = (self._chosen_last.data_ptr(), self._logits_NV.data_ptr())
        self._runner.decoder(x, self._chunks, self.done, until, chosen, top_k, *last, self.all_rows)

    def logits(self) -> Tensor:
        return self._logits_NV

    def draft(self, outcomes: Sequence[Outcome]) -> Sequence[int | None]:
        """A packed model has left multi-token prediction out."""
        return [None] * len(outcomes)
