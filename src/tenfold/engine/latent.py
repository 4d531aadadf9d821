"""Multi-head latent attention of a packed model: torch's module around compiled products."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.config import ModelConfig
from tenfold.engine.kv_cache import LayerKVCache
from tenfold.kernels import native
from tenfold.model.attend import visible
from tenfold.model.attention import Place
from tenfold.model.decoder_layer import DecoderLayer
from tenfold.model.rope import rope_tables
from tenfold.packed import PackedMatrix
from tenfold.panels import unpack_matrix


class PackedLinear(nn.Module):
    def __init__(self, matrix: PackedMatrix, bias: Tensor | None):
        super().__init__()
        self.matrix, self.bias = matrix, bias

    def forward(self, x: Tensor) -> Tensor:
        return native.linear(self.matrix, x.flatten(0, -2), self.bias).view(*x.shape[:-1], self.matrix.rows)


class PackedLatentAttention:
    """x += attention(norm(x)) of one layer, with its cache of the latent."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Any], n: int, batch: int, capacity: int):
        self._config, self._window = config, config.window(n)
        with torch.device("meta"):
            layer = DecoderLayer(config, sparse=False)
        self._norm, self._attention = layer.input_layernorm, layer.self_attn
        self._fill(self._norm, weights, f"layers.{n}.input_layernorm.")
        self._fill(self._attention, weights, f"layers.{n}.self_attn.")
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self._cache = LayerKVCache(torch.empty(batch, 1, capacity, width), torch.empty(batch, 1, capacity, 0))

    def _fill(self, module: nn.Module, weights: Mapping[str, Any], prefix: str) -> None:
        for name, part in module.named_modules():
            at = f"{prefix}{name}." if name else prefix
            weight = weights.get(f"{at}weight")
            if isinstance(weight, PackedMatrix) and name == "kv_b_proj":
                # Decoding folds it into query and output a head at a time: it is needed as numbers.
                unpacked = unpack_matrix(weight.panels, weight.format, weight.rows, weight.columns)
                part.weight = nn.Parameter(unpacked, requires_grad=False)
            elif isinstance(weight, PackedMatrix):
                setattr(module, name, PackedLinear(weight, _floats(weights.get(f"{at}bias"))))
            elif weight is not None:
                part.weight = nn.Parameter(weight.float(), requires_grad=False)

    def add_to(self, x_BSD: Tensor, start: int) -> None:
        """In place, for tokens at positions start, start + 1, …"""
        self._cache.length = start
        new = x_BSD.shape[1]
        cos, sin = rope_tables(self._config, torch.arange(start, start + new))
        mask = visible(new, start + new, self._window, None, x_BSD.device) if new > 1 else None
        place = Place(cos, sin, mask, self._window if new == 1 else None)
        out_BSD = self._attention(self._norm(x_BSD), place, self._cache)
        x_BSD += out_BSD * self._config.residual_multiplier


def _floats(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()
