"""Multi-head latent attention of a packed model: torch's module around compiled products."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.config import ModelConfig
from tenfold.kernels import native
from tenfold.model.decoder_layer import DecoderLayer
from tenfold.packed import PackedMatrix
from tenfold.panels import unpack_matrix


class PackedLinear(nn.Module):
    def __init__(self, matrix: PackedMatrix, bias: Tensor | None):
        super().__init__()
        self.matrix, self.bias = matrix, bias

    def forward(self, x: Tensor) -> Tensor:
        return native.linear(self.matrix, x.flatten(0, -2), self.bias).view(*x.shape[:-1], self.matrix.rows)


def latent_layer(config: ModelConfig, weights: Mapping[str, Any], n: int) -> DecoderLayer:
    """A layer of which only attention and the norm before it are there."""
    with torch.device("meta"):
        layer = DecoderLayer(config, sparse=False)
    for name in ("input_layernorm", "self_attn"):
        _fill(layer.get_submodule(name), weights, f"layers.{n}.{name}.")
    return layer


def _fill(module: nn.Module, weights: Mapping[str, Any], prefix: str) -> None:
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


def _floats(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()
