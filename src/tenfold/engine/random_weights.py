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

from tenfold.checkpoint.pack.layout import (
    KEPT,
    Experts,
    Matrix,
    Part,
    Plain,
    parts_by_file,
    without_predictor,
)
from tenfold.checkpoint.pack.record import down_offset
from tenfold.config import ModelConfig
from tenfold.formats import Packing
from tenfold.packed import PackedExperts, PackedMatrix, PackedModel, Weight
from tenfold.panels import PANEL_ROWS, matrix_bytes, pack_matrix, panel_bytes

ROWS = 1024
"""Different rows of one width: enough that tokens, and the experts of a layer, differ."""
STD = 0.02
FAINT = 1 / 1024


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


def random_packed(config: ModelConfig, packing: Packing) -> PackedModel:
    """A model of that shape in memory. All experts are about equally busy, whatever came before a token."""
    config, source = without_predictor(config), RandomRows()
    return PackedModel(config, {part.name: random_weight(source, part) for part in _parts(config, packing)})


def random_weight(source: RandomRows, part: Part) -> Weight:
    if isinstance(part, Experts):
        return _experts(source, part)
    if isinstance(part, Matrix):
        panels = source.panels(part.name, part.rows, part.columns, part.format)
        return PackedMatrix(panels, part.format, part.rows, part.columns)
    return plain_tensor(source, part)


def random_packed_bytes(config: ModelConfig, packing: Packing) -> int:
    """Bytes of the weights of `random_packed`, counted without making them."""
    size = 0
    for part in _parts(without_predictor(config), packing):
        if isinstance(part, Experts):
            size += part.count * part.record_bytes
        else:
            size += part.num_bytes if isinstance(part, Matrix) else 4 * math.prod(part.shape)
    return size


def plain_tensor(source: RandomRows, part: Plain) -> Tensor:
    """What stays floating point: routers and gates random, norms one, biases zero; float32, of numbers that
    are bf16, as checkpoints have them.

    But for attention's norms: what random attention adds is alike for all tokens, and would soon outweigh
    what tells them apart, so that all would choose the same experts.
    """
    if part.name.endswith(KEPT):
        rows, columns = part.shape
        return source.matrix(part.name, rows, columns).bfloat16().float()
    if "input_layernorm" in part.name:
        return torch.full(part.shape, FAINT)
    return torch.ones(part.shape) if "norm" in part.name else torch.zeros(part.shape)


def _parts(config: ModelConfig, packing: Packing) -> Iterator[Part]:
    return (part for file in parts_by_file(config, packing) for part in file)


def _experts(source: RandomRows, part: Experts) -> PackedExperts:
    """Each record as `tenfold.checkpoint.pack.record` lays it out."""
    form, D, F = part.format, part.hidden_size, part.width
    records = torch.zeros(part.count, part.record_bytes, dtype=torch.uint8)
    middle, end = down_offset(form, D, F), down_offset(form, D, F) + matrix_bytes(form, D, F)
    for expert, record in enumerate(records):
        name = f"{part.name}.{expert}"
        pairs = record[:middle].view(-1, 2, panel_bytes(form, D))
        for half, side in enumerate(("gate", "up")):
            pairs[:, half] = source.panels(f"{name}.{side}", F, D, form).view(len(pairs), -1)
        record[middle:end] = source.panels(f"{name}.down", D, F, form)
    return PackedExperts(records, form, D, F)
