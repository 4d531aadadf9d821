"""Packed models of any shape without a checkpoint: for measuring speed, which no weight's value changes.

Every matrix is made of the rows of one small Gaussian matrix of its width, in an order that follows from
its name. Rows are quantised on their own, so quantising the small one quantises them all, and other
programs' formats can be given the very same weights (`RandomRows.matrix`).
"""

import math
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from tenfold.config import ModelConfig
from tenfold.model.transformer import Transformer
from tenfold.packed import PackedExperts, PackedMatrix, PackedModel, record_bytes
from tenfold.panels import PANEL_ROWS, matrix_bytes, pack_matrix, panel_bytes

ROWS = 1024
"""Different rows of one width: enough that tokens, and the experts of a layer, differ."""
STD = 0.02


class RandomRows:
    """Zero-mean Gaussian matrices (std 0.02) by name; the same name and sizes, the same matrix."""

    def __init__(self) -> None:
        self._rows: dict[int, Tensor] = {}
        self._panels: dict[tuple[int, str], Tensor] = {}

    def rows(self, columns: int) -> Tensor:
        """The (ROWS, columns) float32 rows that all matrices of that width are made of."""
        if columns not in self._rows:
            generator = torch.Generator().manual_seed(columns)
            self._rows[columns] = torch.randn(ROWS, columns, generator=generator) * STD
        return self._rows[columns]

    def order(self, name: str, rows: int) -> Tensor:
        """Which of `rows` each row of a matrix is: from a panel that `name` chooses, round and round."""
        return (_first_panel(name) * PANEL_ROWS + torch.arange(rows)) % ROWS

    def matrix(self, name: str, rows: int, columns: int) -> Tensor:
        """The weights that `panels` quantises: (rows, columns), float32."""
        return self.rows(columns)[self.order(name, rows)]

    def panels(self, name: str, rows: int, columns: int, form: str) -> Tensor:
        """The matrix packed: uint8, `matrix_bytes` long, in memory of its own."""
        whole, rest = divmod(rows, PANEL_ROWS)
        panels_PX = self._packed(columns, form)
        out = torch.empty(matrix_bytes(form, rows, columns), dtype=torch.uint8)
        out_PX = out.view(-1, panels_PX.shape[1])
        chosen = (_first_panel(name) + torch.arange(whole)) % len(panels_PX)
        torch.index_select(panels_PX, 0, chosen, out=out_PX[:whole])
        if rest:
            out_PX[whole] = pack_matrix(self.matrix(name, rows, columns)[-rest:], form)
        return out

    def _packed(self, columns: int, form: str) -> Tensor:
        if (columns, form) not in self._panels:
            packed = pack_matrix(self.rows(columns), form)
            self._panels[columns, form] = packed.view(-1, panel_bytes(form, columns))
        return self._panels[columns, form]


def _first_panel(name: str) -> int:
    return zlib.crc32(name.encode()) % (ROWS // PANEL_ROWS)


def random_packed(config: ModelConfig, experts: str, rest: str) -> PackedModel:
    """A model of that shape in memory: routed experts in format `experts`, other matrices in `rest`.

    Routers are random too, so all experts are about equally busy. Takes `random_packed_bytes` of memory.
    """
    source = RandomRows()
    weights: dict[str, Tensor | PackedMatrix | PackedExperts] = {}
    for name, shape in _tensors(config):
        if name.endswith(".experts.gate_up"):
            layer = name.removesuffix(".gate_up")
            weights[layer] = _experts(source, config, layer, experts)
        elif _stays_float(name, shape):
            weights[name] = random_tensor(source, name, shape)
        else:
            weights[name] = PackedMatrix(source.panels(name, *shape, rest), rest, *shape)
    return PackedModel(config, weights)


def random_tensor(source: RandomRows, name: str, shape: torch.Size) -> Tensor:
    """What is no packed matrix: routers random, norms one, biases zero; float32."""
    if len(shape) == 2 and not name.endswith("bias"):
        return source.matrix(name, *shape)
    return torch.ones(shape) if "norm" in name else torch.zeros(shape)


def random_packed_bytes(config: ModelConfig, experts: str, rest: str) -> int:
    """Bytes of the weights of `random_packed`, counted without making them."""
    size = 0
    for name, shape in _tensors(config):
        if name.endswith(".experts.gate_up"):
            size += shape[0] * record_bytes(experts, config.hidden_size, config.moe_intermediate_size)
        else:
            size += 4 * math.prod(shape) if _stays_float(name, shape) else matrix_bytes(rest, *shape)
    return size


def _tensors(config: ModelConfig) -> Iterator[tuple[str, torch.Size]]:
    """Our tensors by name, those of the experts' two matrices once and as `gate_up`."""
    with torch.device("meta"):
        model = Transformer(config.model_copy(update={"num_nextn_predict_layers": 0}))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not name.endswith(".experts.down"):
            yield name, tensor.shape


def _stays_float(name: str, shape: torch.Size) -> bool:
    return len(shape) < 2 or name.endswith(("bias", ".router.weight", ".shared_expert_gate.weight"))


def _experts(source: RandomRows, config: ModelConfig, layer: str, form: str) -> PackedExperts:
    """Records of one layer: pairs of gate and up panels, then those of down, then zeros."""
    D, F = config.hidden_size, config.moe_intermediate_size
    size = record_bytes(form, D, F)
    records = torch.zeros(config.num_experts, size, dtype=torch.uint8)
    for expert, record in enumerate(records):
        name = f"{layer}.{expert}"
        gate, up = (source.panels(f"{name}.{part}", F, D, form) for part in ("gate", "up"))
        pairs = torch.stack([part.view(-1, panel_bytes(form, D)) for part in (gate, up)], dim=1).flatten()
        down = source.panels(f"{name}.down", D, F, form)
        record[: len(pairs)] = pairs
        record[len(pairs) : len(pairs) + len(down)] = down
    return PackedExperts(records, form, D, F)
