"""Keys and values of the positions so far, in buffers of a fixed size."""

import torch
from torch import Tensor

from tenfold.config import ModelConfig


class LayerKVCache:
    """One layer's (B, H_kv, capacity, head_dim) keys and values, filled from the front."""

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
    """An empty cache for `capacity` positions, one entry a layer."""
    shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
    return [
        LayerKVCache(
            torch.empty(shape, dtype=dtype, device=device),
            torch.empty(shape, dtype=dtype, device=device),
        )
        for _ in range(config.num_hidden_layers)
    ]
