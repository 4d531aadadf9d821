"""Running a packed model: the prompt in pieces, then token by token, through the compiled kernels."""

import numpy as np
import torch
from torch import Tensor

from tenfold import compiled
from tenfold.device import keep_freed_memory
from tenfold.engine.latent import PackedLatentAttention
from tenfold.engine.native_layers import NativeLayers
from tenfold.errors import TenfoldError
from tenfold.packed import PackedModel

PIECE = 1024
"""Tokens of all sequences together that go through the layers at once, which bounds the memory they take."""
BLOCK = 32
"""Positions and head dimensions that the cache comes in multiples of (csrc/attention.hpp)."""


class PackedRunner:
    """`batch` sequences of equal length and their KV caches in bf16, for `capacity` positions."""

    def __init__(self, model: PackedModel, batch: int, capacity: int):
        config = model.config
        config.check_generates()
        keep_freed_memory()
        self.config, self.batch = config, batch
        self.capacity = -(-capacity // BLOCK) * BLOCK
        self._native = NativeLayers(config, model.weights, self.capacity)
        self._norm = self._native.address("norm.weight")
        self._embedding = self._native.linear("embed_tokens")
        self._head = self._embedding if config.tie_word_embeddings else self._native.linear("lm_head")
        self._latent = [
            PackedLatentAttention(config, model.weights, n, batch, self.capacity)
            for n in range(config.num_hidden_layers * config.is_latent)
        ]
        self._keys, self._values = ([self._new_cache() for _ in self._native.layers] for _ in "kv")
        self._decoder = compiled.module().Decoder(
            layers=self._native.layers,
            keys=[cache.data_ptr() for cache in self._keys],
            values=[cache.data_ptr() for cache in self._values],
            capacity=self.capacity,
        )
        self.length = 0

    def _new_cache(self) -> Tensor:
        """Of keys or values, in the kernels' own layout. Numpy's zeros take memory only as they are used."""
        width = 0 if self.config.is_latent else -(-self.config.head_dim // BLOCK) * BLOCK
        shape = (self.batch, self.config.num_key_value_heads, self.capacity * width)
        return torch.from_numpy(np.zeros(shape, np.uint16)).view(torch.bfloat16)

    def reset(self) -> None:
        """Forget all positions."""
        self.length = 0
        for values in self._values:
            values.zero_()  # those beyond the last position have no weight, but no weight times NaN is NaN

    @torch.inference_mode()
    def forward(self, ids_BS: Tensor) -> Tensor:
        """Logits (B, V) after the last of the new tokens, which the caches then hold.

        Raises TenfoldError for ids that are no tokens, and for more of them than there is room for.
        """
        self._check(ids_BS)
        x_BSD = torch.empty(0)
        for piece_BS in ids_BS.split(max(1, PIECE // self.batch), dim=1):
            x_BSD = self._attended(piece_BS)
        x_BD = x_BSD[:, -1].contiguous()
        self._native.layers[-1].feed_forward(x_BD.data_ptr(), self.batch)
        return self._logits(x_BD)

    def _check(self, ids_BS: Tensor) -> None:
        """The kernels trust what they are given."""
        if ids_BS.ndim != 2 or len(ids_BS) != self.batch or not ids_BS.numel():
            raise TenfoldError(f"token ids of shape {tuple(ids_BS.shape)} must be ({self.batch}, 1 or more)")
        least, most = ids_BS.aminmax()
        if least < 0 or most >= self.config.vocab_size:
            wrong, last = int(least if least < 0 else most), self.config.vocab_size - 1
            raise TenfoldError(f"token id {wrong} is none of the model's, which are 0 to {last}")
        if (length := self.length + ids_BS.shape[1]) > self.capacity:
            raise TenfoldError(f"{length} positions are more than the {self.capacity} there is room for")

    def _attended(self, ids_BS: Tensor) -> Tensor:
        """All layers but for the last one's feed-forward, which only tokens that predict need."""
        new, tokens = ids_BS.shape[1], ids_BS.numel()
        ids = ids_BS.int().contiguous()
        x_BSD = torch.empty(*ids.shape, self.config.hidden_size)
        self._embedding.rows(ids.data_ptr(), tokens, x_BSD.data_ptr())
        if self.config.embedding_multiplier != 1:
            x_BSD *= self.config.embedding_multiplier
        sequences = torch.arange(self.batch, dtype=torch.int32).repeat_interleave(new)
        positions = torch.arange(self.length, self.length + new, dtype=torch.int32).repeat(self.batch)
        self._run_layers(x_BSD, sequences, positions)
        self.length += new
        return x_BSD

    def _run_layers(self, x_BSD: Tensor, sequences_T: Tensor, positions_T: Tensor) -> None:
        tokens = len(positions_T)
        if not self._latent:
            self._decoder(x_BSD.data_ptr(), sequences_T.data_ptr(), positions_T.data_ptr(), tokens)
            return
        for n, attention in enumerate(self._latent):
            if n > 0:
                self._native.layers[n - 1].feed_forward(x_BSD.data_ptr(), tokens)
            attention.add_to(x_BSD, self.length)

    def _logits(self, x_BD: Tensor) -> Tensor:
        config = self.config
        normed_BD, logits_BV = torch.empty_like(x_BD), torch.empty(len(x_BD), config.vocab_size)
        sizes = (len(x_BD), config.hidden_size, config.rms_norm_eps)
        compiled.module().rms_norm(x_BD.data_ptr(), self._norm, *sizes, normed_BD.data_ptr())
        self._head(normed_BD.data_ptr(), len(x_BD), logits_BV.data_ptr())
        return logits_BV if config.logits_scaling == 1 else logits_BV / config.logits_scaling
