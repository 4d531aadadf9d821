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


def cache_shape(config: ModelConfig) -> tuple[int, int, int]:
    """Of one position in one layer: heads, and the width of their keys and of their values.

    MLA caches its latent alone, as the key of one head.
    """
    if config.is_latent:
        return 1, config.kv_lora_rank + config.qk_rope_head_dim, 0
    return config.num_key_value_heads, config.head_dim, config.head_dim


def new_kv_cache(
    config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
) -> list[LayerKVCache]:
    """An empty cache for `capacity` positions, one entry a layer."""
    heads, key_width, value_width = cache_shape(config)
    return [
        LayerKVCache(
            torch.empty(batch, heads, capacity, key_width, dtype=dtype, device=device),
            torch.empty(batch, heads, capacity, value_width, dtype=dtype, device=device),
        )
        for _ in range(config.num_hidden_layers)
    ]
