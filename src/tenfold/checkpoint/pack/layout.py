"""What a packed model consists of: worked out from its config alone."""

from dataclasses import dataclass

import torch

from tenfold.checkpoint.pack.record import record_bytes, whole_pages
from tenfold.config import ModelConfig
from tenfold.formats import Packing
from tenfold.model.transformer import Transformer
from tenfold.panels import matrix_bytes

KEPT = ("router.weight", "shared_expert_gate.weight")
"""Matrices that stay floating point: small, and they decide what the rest is worth."""


@dataclass(frozen=True)
class Matrix:
    name: str
    rows: int
    columns: int
    format: str

    @property
    def num_bytes(self) -> int:
        return matrix_bytes(self.format, self.rows, self.columns)

    @property
    def label(self) -> str:
        return f"{self.format} {self.rows}x{self.columns}"

    @property
    def stored(self) -> dict[str, tuple[int, ...]]:
        """The shapes of its tensors in a file, by name."""
        return {self.name: (whole_pages(self.num_bytes),)}


@dataclass(frozen=True)
class Experts:
    """All routed experts of a layer; a tensor in the file each."""

    name: str
    count: int
    hidden_size: int
    width: int
    format: str

    @property
    def record_bytes(self) -> int:
        return record_bytes(self.format, self.hidden_size, self.width)

    @property
    def label(self) -> str:
        return f"{self.format} {self.hidden_size}x{self.width}"

    @property
    def stored(self) -> dict[str, tuple[int, ...]]:
        return {f"{self.name}.{expert}": (self.record_bytes,) for expert in range(self.count)}


@dataclass(frozen=True)
class Plain:
    """A tensor that stays floating point."""

    name: str
    shape: tuple[int, ...]

    @property
    def label(self) -> str:
        return f"plain {'x'.join(map(str, self.shape))}"

    @property
    def stored(self) -> dict[str, tuple[int, ...]]:
        return {self.name: self.shape}


Part = Experts | Matrix | Plain


def without_predictor(config: ModelConfig) -> ModelConfig:
    """Multi-token prediction is of no use to what a packed model is for, and left out."""
    return config.model_copy(update={"num_nextn_predict_layers": 0})


def parts_by_file(config: ModelConfig, packing: Packing) -> list[list[Part]]:
    """The parts of each file of a packed model: first what is in no layer, then a layer each.

    A tied embedding stays at q8 where the rest is q4: what it is off by counts twice, as input and as head.
    """
    by_layer: dict[str, list[Part]] = {}
    with torch.device("meta"):
        model = Transformer(config)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not name.endswith(".experts.down"):  # which is in the record that gate_up begins
            layer = name.split(".")[1] if name.startswith("layers.") else ""
            by_layer.setdefault(layer, []).append(_part(name, tuple(tensor.shape), config, packing))
    return list(by_layer.values())


def _part(name: str, shape: tuple[int, ...], config: ModelConfig, packing: Packing) -> Part:
    if name.endswith(".experts.gate_up"):
        count, double_width, hidden_size = shape
        return Experts(name.removesuffix(".gate_up"), count, hidden_size, double_width // 2, packing.experts)
    if len(shape) == 2 and name.endswith(".weight") and not name.endswith(KEPT):
        is_head_too = name == "embed_tokens.weight" and config.tie_word_embeddings
        return Matrix(name, *shape, "q8" if is_head_too and packing.rest == "q4" else packing.rest)
    return Plain(name, shape)
