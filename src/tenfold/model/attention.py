"""Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with optional QK-norm."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold.config import ModelConfig
from tenfold.model.layers import RMSNorm, apply_rope

MATMUL_LENGTH = 256
"""On the CPU in bf16, attention written out is 1.5 to 3 times as fast as torch's flash kernel up to
this length; beyond it the scores that causality throws away cost more than they save (LOG.md)."""


class LayerCache(Protocol):
    """What attention needs of a KV cache, one layer of it."""

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, H_kv, S, head_dim) and return all keys and values so far."""
        ...


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        q_dim = config.num_attention_heads * config.head_dim
        kv_dim = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_dim, config.hidden_size, bias=False)
        if config.qk_norm != "none":
            per_head = config.qk_norm == "head"
            self.q_norm = RMSNorm(config.head_dim if per_head else q_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim if per_head else kv_dim, config.rms_norm_eps)

    def forward(self, x_BSD: Tensor, rope: tuple[Tensor, Tensor], cache: LayerCache | None = None) -> Tensor:
        query, key, value = self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD)
        if self.config.qk_norm == "full":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = self._heads(query), self._heads(key), self._heads(value)
        if self.config.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = (apply_rope(t.transpose(1, 2), *rope) for t in (query, key))
        value = value.transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value)
        out = self._attend(query, key, value)
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return projected

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.config.head_dim))
        return heads

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention of the last S positions over all of them."""
        new, total = query.shape[2], key.shape[2]
        in_bf16_on_cpu = query.dtype == torch.bfloat16 and query.device.type == "cpu"
        if in_bf16_on_cpu and new == total <= MATMUL_LENGTH:
            return _attend_by_matmul(query, key, value)
        mask = None
        if 1 < new < total:
            mask = _causal(new, total, query.device)
        out: Tensor = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=new == total > 1,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out


def _attend_by_matmul(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention as two products and a softmax."""
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    future = _causal(query.shape[2], key.shape[2], query.device).logical_not()
    scores = (query * query.shape[-1] ** -0.5) @ key.mT
    return torch.matmul(scores.masked_fill(future, -torch.inf).softmax(-1), value)


def _causal(new: int, total: int, device: torch.device) -> Tensor:
    """True where one of the last `new` positions may look, over all `total`."""
    return torch.ones(new, total, dtype=torch.bool, device=device).tril(diagonal=total - new)
