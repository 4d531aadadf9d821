"""Matrices as the kernels read them: panels of 16 rows, cut into blocks of 32 columns.

Both are padded with zeros. In a block every row has 64 (bf16), 32 (q8) or 16 bytes (q4, mxfp4), and the
rows are interleaved four bytes at a time: the first four of row 0, of row 1, ... of row 15, the next four
of row 0, and so on, so that one load of 64 bytes is the same columns of all rows. A panel is the bytes of
its blocks, then their scale bytes (16 a block, one a row; none in bf16), then 16 float32 row scales (q8 and
q4), then zeros to a multiple of 64 bytes. A matrix is its panels one after another.

A row's bytes in a block are its codes, except where codes are nibbles: there byte 4j + c holds column
8j + c in its low half and column 8j + 4 + c in its high half. bf16 is little-endian.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold import compiled
from tenfold.errors import TenfoldError
from tenfold.quantization import BLOCK, QUANTIZED, QuantizedRows, dequantize, quantize

PANEL_ROWS = 16
FORMATS = ("bf16", *QUANTIZED)

_ROW_BYTES = {"bf16": 2 * BLOCK, "q8": BLOCK, "q4": BLOCK // 2, "mxfp4": BLOCK // 2}
_ROW_SCALES = ("q8", "q4")
_ALIGNMENT = 64
_GROUP = 4
_MOST_WEIGHTS = 1 << 18
"""Weights worked on at once, which bounds memory; a panel of very long rows may be more."""


def panel_bytes(form: str, columns: int) -> int:
    """Bytes of one panel of a matrix with that many columns. A TenfoldError if the format is unknown."""
    return math.ceil(sum(_sections(form, _blocks(columns))) / _ALIGNMENT) * _ALIGNMENT


def matrix_bytes(form: str, rows: int, columns: int) -> int:
    """Bytes of all panels of a matrix. A TenfoldError if the format is unknown."""
    return math.ceil(rows / PANEL_ROWS) * panel_bytes(form, columns)


def pack_matrix(weights_NK: Tensor, form: str, importance_K: Tensor | None = None) -> Tensor:
    """Quantise a matrix of any float dtype and lay it out: uint8, `matrix_bytes` long.

    `importance_K` weighs the squared error of each column (its mean squared activation), where a format
    has a choice to make. A TenfoldError if a weight is NaN, infinite or at least 2^127, or the importance
    does not fit; it does not name the tensor, which the caller knows.
    """
    rows, columns = weights_NK.shape
    padding = _blocks(columns) * BLOCK - columns
    if importance_K is not None:
        importance_K = F.pad(_checked_importance(importance_K, columns), (0, padding))
    out = torch.zeros(matrix_bytes(form, rows, columns), dtype=torch.uint8)
    panels_PX = out.view(-1, panel_bytes(form, columns))
    for start, stop in _slabs(rows, columns):
        slab = _checked(weights_NK[start:stop].detach().float().contiguous())
        slab = F.pad(slab, (0, padding, 0, -len(slab) % PANEL_ROWS))
        first = start // PANEL_ROWS
        _write(panels_PX[first : first + len(slab) // PANEL_ROWS], slab, form, importance_K)
    return out


def unpack_matrix(panels: Tensor, form: str, rows: int, columns: int) -> Tensor:
    """The (rows, columns) float32 matrix that panels stand for: what the kernels multiply by, exactly.

    A TenfoldError if `panels` is not as long as such a matrix.
    """
    size = matrix_bytes(form, rows, columns)
    if panels.dtype != torch.uint8 or panels.shape != (size,):
        shape = tuple(panels.shape)
        raise TenfoldError(
            f"{panels.dtype} of shape {shape} is no {form} matrix of {rows} x {columns}: needs {size} bytes"
        )
    panels_PX = panels.view(-1, panel_bytes(form, columns))
    out = torch.empty(rows, columns)
    for start, stop in _slabs(rows, columns):
        slab = panels_PX[start // PANEL_ROWS : math.ceil(stop / PANEL_ROWS)]
        out[start:stop] = _read(slab, form, _blocks(columns))[: stop - start, :columns]
    return out


def _write(panels_PX: Tensor, weights_RK: Tensor, form: str, importance_K: Tensor | None) -> None:
    """Fill panels, all zeros, with padded rows: by the compiled module where it is there, else by torch."""
    if compiled.available():
        weights_RK = weights_RK.contiguous()
        importance = 0 if importance_K is None else importance_K.data_ptr()
        sizes = (FORMATS.index(form), weights_RK.data_ptr(), *weights_RK.shape)
        compiled.module().quantize(*sizes, importance, panels_PX.data_ptr())
    else:
        write_by_torch(panels_PX, weights_RK, form, importance_K)


def write_by_torch(panels_PX: Tensor, weights_RK: Tensor, form: str, importance_K: Tensor | None) -> None:
    """The same in torch: what the compiled quantiser is tested against, and does without a compiler."""
    codes, scales, row_scales = _split(panels_PX, form, weights_RK.shape[1] // BLOCK)
    if form == "bf16":
        codes.copy_(_interleave(weights_RK.bfloat16().view(torch.uint8), codes))
        return
    quantized = quantize(weights_RK, form, importance_K)
    row_bytes = quantized.codes_RK if form == "q8" else _pair_nibbles(quantized.codes_RK)
    codes.copy_(_interleave(row_bytes, codes))
    scales.copy_(quantized.scales_Rb.view(len(scales), PANEL_ROWS, -1).mT.reshape(scales.shape))
    row_scales.copy_(quantized.row_scales_R.view(torch.uint8).view(len(scales), -1)[:, : row_scales.shape[1]])


def _read(panels_PX: Tensor, form: str, blocks: int) -> Tensor:
    """Padded float32 rows out of panels."""
    codes, scales, row_scales = _split(panels_PX, form, blocks)
    grouped = codes.reshape(len(codes), blocks, -1, PANEL_ROWS, _GROUP)
    row_bytes = grouped.permute(0, 3, 1, 2, 4).reshape(-1, blocks * _ROW_BYTES[form])
    if form == "bf16":
        return row_bytes.view(torch.bfloat16).float()
    scales_Rb = scales.reshape(-1, blocks, PANEL_ROWS).mT.reshape(-1, blocks)
    row_scales_R = torch.ones(len(scales_Rb))
    if form in _ROW_SCALES:
        row_scales_R = row_scales.clone(memory_format=torch.contiguous_format).view(torch.float32).flatten()
    codes_RK = row_bytes if form == "q8" else _part_nibbles(row_bytes)
    return dequantize(QuantizedRows(codes_RK, scales_Rb, row_scales_R), form)


def _interleave(row_bytes: Tensor, codes: Tensor) -> Tensor:
    """Bytes in the order of rows to the order of panels, in the shape of `codes`."""
    groups = codes.shape[1] // (PANEL_ROWS * _GROUP)
    return row_bytes.view(-1, PANEL_ROWS, groups, _GROUP).transpose(1, 2).reshape(codes.shape)


def _pair_nibbles(codes_RK: Tensor) -> Tensor:
    low, high = codes_RK.view(len(codes_RK), -1, 2, _GROUP).unbind(2)
    return (low | high << 4).flatten(1)


def _part_nibbles(row_bytes: Tensor) -> Tensor:
    groups = row_bytes.view(len(row_bytes), -1, _GROUP)
    return torch.stack((groups & 15, groups >> 4), dim=2).flatten(1)


def _split(panels_PX: Tensor, form: str, blocks: int) -> tuple[Tensor, ...]:
    """Views of the codes, the scale bytes and the row scales of panels."""
    sizes = _sections(form, blocks)
    return torch.split(panels_PX[:, : sum(sizes)], sizes, dim=1)


def _sections(form: str, blocks: int) -> list[int]:
    """Bytes of a panel's codes, scale bytes and row scales."""
    if form not in FORMATS:
        raise TenfoldError(f"format {form!r} is unknown: use one of {', '.join(FORMATS)}")
    scales = 0 if form == "bf16" else blocks * PANEL_ROWS
    row_scales = 4 * PANEL_ROWS if form in _ROW_SCALES else 0
    return [blocks * PANEL_ROWS * _ROW_BYTES[form], scales, row_scales]


def _blocks(columns: int) -> int:
    return math.ceil(columns / BLOCK)


def _slabs(rows: int, columns: int) -> list[tuple[int, int]]:
    """Ranges of rows, whole panels each, that are worked on at once."""
    step = max(1, _MOST_WEIGHTS // (PANEL_ROWS * max(columns, 1))) * PANEL_ROWS
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _checked(weights_RK: Tensor) -> Tensor:
    """Below 2^127 nothing that is rounded up becomes infinite."""
    if not bool((weights_RK.abs() < 2.0**127).all()):
        raise TenfoldError("holds NaN, infinity or a weight of 2^127 or more: these cannot be packed")
    return weights_RK


def _checked_importance(importance_K: Tensor, columns: int) -> Tensor:
    if importance_K.shape != (columns,):
        raise TenfoldError(
            f"importance of shape {tuple(importance_K.shape)}: needs one number a column ({columns})"
        )
    importance_K = importance_K.float()
    if not bool(((importance_K >= 0) & (importance_K < torch.inf)).all()):
        raise TenfoldError("importance must be finite and not negative in every column")
    return importance_K
