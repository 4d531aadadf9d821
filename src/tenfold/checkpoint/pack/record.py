"""One expert as one record, in the order in which a kernel reads it.

For each panel of gate, that panel and the same one of up, so that both are read once for the same
activations; then the panels of down; then zeros up to a page. Gate and up are padded to whole panels each.
"""

from math import ceil

import torch
from torch import Tensor

from tenfold.panels import PANEL_ROWS, matrix_bytes, pack_matrix, panel_bytes

PAGE = 4096


def whole_pages(num_bytes: int) -> int:
    return ceil(num_bytes / PAGE) * PAGE


def down_offset(form: str, hidden_size: int, width: int) -> int:
    """Where the panels of down begin."""
    return 2 * matrix_bytes(form, width, hidden_size)


def record_bytes(form: str, hidden_size: int, width: int) -> int:
    down = matrix_bytes(form, hidden_size, width)
    return whole_pages(down_offset(form, hidden_size, width) + down)


def pack_record(
    gate_up_2FD: Tensor,
    down_DF: Tensor,
    form: str,
    importance_D: Tensor | None = None,
    importance_F: Tensor | None = None,
) -> Tensor:
    """An expert's record, uint8 and `record_bytes` long; importances are `pack_matrix`'s."""
    hidden_size, width = down_DF.shape
    record = torch.zeros(record_bytes(form, hidden_size, width), dtype=torch.uint8)
    at = down_offset(form, hidden_size, width)
    pairs = record[:at].view(-1, 2, panel_bytes(form, hidden_size))
    for half, weights_FD in enumerate(gate_up_2FD.chunk(2)):
        pairs[:, half] = pack_matrix(weights_FD, form, importance_D).view(len(pairs), -1)
    down = pack_matrix(down_DF, form, importance_F)
    record[at : at + len(down)] = down
    return record


def panel_rows(start: int, stop: int) -> tuple[int, int]:
    """The first panel that holds rows [start, stop), and the one after the last."""
    return start // PANEL_ROWS, ceil(stop / PANEL_ROWS)
