"""Keys and values of the positions so far, in buffers of a fixed size."""

import torch
from torch import Tensor

from tenfold.config import ModelConfig


class LayerKVCache:
    """One layer's (B, H_kv, capacity, width) keys and values, filled from the front."""

    def __init__(self, key: Tensor, value: Tensor):
        self.key, self.value = key, value
        self.length = 0

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + key.shape[2]
        self.key[:, :, self.length : end] = key
        self.value[:, :, self.length : end] = value
        self.length = end
        return self.key[:, :, :end], self.value[:, :, :end]


def new_kv_cache(
    config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
) -> list[LayerKVCache]:
    """An empty cache for `capacity` positions, one entry a layer; MLA caches its latent alone."""
    heads, key_width, value_width = config.num_key_value_heads, config.head_dim, config.head_dim
    if config.is_latent:
        heads, key_width, value_width = 1, config.kv_lora_rank + config.qk_rope_head_dim, 0
    return [
        LayerKVCache(
            torch.empty(batch, heads, capacity, key_width, dtype=dtype, device=device),
            torch.empty(batch, heads, capacity, value_width, dtype=dtype, device=device),
        )
        for _ in range(config.num_hidden_layers)
    ]
