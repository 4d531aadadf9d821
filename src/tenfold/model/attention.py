"""Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245), with what families add to it."""

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tenfold.config import ModelConfig
from tenfold.model.attend import attend
from tenfold.model.layers import RMSNorm
from tenfold.model.rope import apply_rope, score_scale


class LayerCache(Protocol):
    """What attention needs of a KV cache, one layer of it."""

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, H_kv, S, width) and return all keys and values so far."""
        ...


class Place(NamedTuple):
    """Where the tokens of a forward pass stand: the same for every layer of one kind."""

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    """As `attend.visible` makes it."""
    last: int | None
    """How many of the last keys a single new token sees; None is all that `mask` allows."""

    def seen(self, keys: Tensor) -> Tensor:
        """Of keys or values (B, H_kv, T, width), those within reach."""
        return keys if self.last is None else keys[:, :, -self.last :]


class BaseAttention(nn.Module, ABC):
    """In three steps, of which `attend` alone needs to know which tokens are of one sequence."""

    o_proj: nn.Linear

    def forward(self, x_BSD: Tensor, place: Place, cache: LayerCache | None = None) -> Tensor:
        query, key, value = self.project(x_BSD, place.cos, place.sin)
        if cache is not None:
            key, value = map(place.seen, cache.update(key, value))
        return self.output(self.attend(query, key, value, place.mask))

    @abstractmethod
    def project(self, x_BSD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, H, S, width), and the key and value (B, H_kv, S, width) that are cached."""

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Of the last S positions over all T that were cached, (B, H, S, value width)."""

    def output(self, out: Tensor) -> Tensor:
        """What `attend` returned, as the layer adds it: (B, S, D)."""
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return projected


class Attention(BaseAttention):
    """QK-norm, biases and attention sinks (gpt-oss; Xiao et al. 2023, arXiv:2309.17453) are options."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.scale = score_scale(config)
        self.sinks: nn.Parameter | None
        q_dim = config.num_attention_heads * config.head_dim
        kv_dim = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_dim, config.hidden_size, bias=config.attention_out_bias)
        if config.qk_norm != "none":
            per_head = config.qk_norm == "head"
            self.q_norm = RMSNorm(config.head_dim if per_head else q_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim if per_head else kv_dim, config.rms_norm_eps)
        sinks = nn.Parameter(torch.zeros(config.num_attention_heads)) if config.attention_sinks else None
        self.register_parameter("sinks", sinks)

    def project(self, x_BSD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD)
        if self.config.qk_norm == "full":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = self._heads(query), self._heads(key), self._heads(value)
        if self.config.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        interleave = self.config.rope_interleave
        query, key = (apply_rope(t.transpose(1, 2), cos, sin, interleave) for t in (query, key))
        return query, key, value.transpose(1, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return attend(query, key, value, self.scale, mask, self.sinks)

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.config.head_dim))
        return heads
