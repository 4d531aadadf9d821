"""Weights to codes and scales and back: pure functions on tensors. `panels` lays the codes out.

q8, q4 and mxfp4 are blocks of 32 columns of a row that share a scale byte. A weight is scale times value:

| format | value of a code | scale |
|---|---|---|
| q8 | code - 128, in -127..127 | row scale * 2^((s >> 4) - 15) * (1 + (s & 15) / 16) |
| q4 | `Q4_VALUES[code]` | the same |
| mxfp4 | `FP4_VALUES[code]` | 2^(s - 127) (OCP Microscaling Formats 1.0) |

Row scales are powers of two, so that a q8 or q4 weight is exact in float32, however it is multiplied out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the sixteen codes of E2M1 stand for (OCP Microscaling Formats 1.0, table 5)."""

Q4_VALUES = (-120, -105, -90, -75, -60, -45, -30, -15, 0, 15, 30, 45, 60, 75, 90, 105)

BLOCK = 32
"""Weights that share one scale."""

QUANTIZED = ("q8", "q4", "mxfp4")

_Q4_STEPS = (0, -1, -2, -3, 1, 2, 3)
_SMALLEST_ROW_SCALE = 2.0**-100


@dataclass(frozen=True)
class QuantizedRows:
    """R rows of K columns (a multiple of `BLOCK`), b blocks a row."""

    codes_RK: Tensor
    """uint8; below 16 in q4 and mxfp4."""
    scales_Rb: Tensor
    """uint8"""
    row_scales_R: Tensor
    """float32; ones in mxfp4."""


def quantize(weights_RK: Tensor, form: str, importance_K: Tensor | None = None) -> QuantizedRows:
    """Codes and scales of finite float32 rows below 2^127, in one of the formats of `QUANTIZED`."""
    if form == "q8":
        return _quantize_q8(weights_RK)
    quantize_4bit = _quantize_q4 if form == "q4" else _quantize_mxfp4
    return quantize_4bit(weights_RK, importance_K)


def dequantize(rows: QuantizedRows, form: str) -> Tensor:
    """Float32 weights (R, K)."""
    codes = _in_blocks(rows.codes_RK)
    if form == "q8":
        values = codes.float() - 128
    else:
        values = torch.tensor(FP4_VALUES if form == "mxfp4" else Q4_VALUES, dtype=torch.float32)[codes.int()]
    if form == "mxfp4":
        return (_powers_of_two(rows.scales_Rb)[..., None] * values).flatten(1)
    scales_Rb = rows.row_scales_R[:, None] * _minifloats(rows.scales_Rb)
    return (scales_Rb[..., None] * values).flatten(1)


def dequantize_fp8_blocks(weight: Tensor, scale_inv: Tensor, block_size: tuple[int, int]) -> Tensor:
    """Multiply every block of a matrix by its scale, in float32 (DeepSeek-V3, arXiv:2412.19437, 3.3).

    `weight` is (rows, columns) in a float8 dtype, `scale_inv` (⌈rows / block rows⌉, ⌈columns / block
    columns⌉); blocks at the right and lower edges may be cut short. The result is float32.
    """
    out = weight.float()
    block_rows, block_columns = (min(*sizes) for sizes in zip(block_size, out.shape, strict=True))
    scales = scale_inv.float().repeat_interleave(block_columns, dim=1)[:, : out.shape[1]]
    for row, scale in enumerate(scales):  # in place: a whole matrix of scales would double the memory
        out[row * block_rows : (row + 1) * block_rows] *= scale
    return out


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Float32 weights from gpt-oss's MXFP4 (OCP Microscaling Formats 1.0).

    `blocks` is (..., rows, blocks, 16) uint8, two codes a byte with the low one first; `scales` is
    (..., rows, blocks) uint8, exponents of two biased by 127.
    The result is (..., columns, rows): as the model multiplies by it, transposed from what is stored.
    """
    values = torch.tensor(FP4_VALUES, dtype=torch.float32)
    code = torch.arange(256)
    pairs = torch.stack((values[code & 15], values[code >> 4]), dim=1)
    out = pairs[blocks.int()].flatten(-2)
    return out.ldexp_(scales.int()[..., None] - 127).flatten(-2).mT


def _quantize_q8(weights_RK: Tensor) -> QuantizedRows:
    """The scale is the largest weight of the block over 127, rounded up: no code is cut short."""
    row_scales_R = _row_scales(weights_RK)
    x_RbC = _in_blocks(weights_RK / row_scales_R[:, None])
    scales_Rb = _minifloat_codes(x_RbC.abs().amax(dim=2) / 127)
    inverse_Rb = 1 / _minifloats(scales_Rb)
    codes = (x_RbC * inverse_Rb[..., None]).round_().clamp_(-127, 127) + 128
    return QuantizedRows(codes.to(torch.uint8).flatten(1), scales_Rb, row_scales_R)


def _quantize_q4(weights_RK: Tensor, importance_K: Tensor | None) -> QuantizedRows:
    row_scales_R = _row_scales(weights_RK)
    x_RbC = _in_blocks(weights_RK / row_scales_R[:, None])
    largest_code = _minifloat_codes(x_RbC.abs().amax(dim=2) / Q4_VALUES[-1]).int()
    candidates = [(largest_code + step).clamp_(0, 255) for step in _Q4_STEPS]
    codes, scales_Rb = _best_scales(x_RbC, Q4_VALUES, candidates, _minifloats, importance_K)
    return QuantizedRows(codes.flatten(1), scales_Rb, row_scales_R)


def _quantize_mxfp4(weights_RK: Tensor, importance_K: Tensor | None) -> QuantizedRows:
    """The exponent of the OCP specification (6.3), or the next, under which 7 is not cut to 6.

    With the first, weights that came from MXFP4 keep their values.
    """
    x_RbC = _in_blocks(weights_RK)
    exponents = (x_RbC.abs().amax(dim=2).view(torch.int32) >> 23) - 2
    candidates = [(exponents + step).clamp_(0, 254) for step in (0, 1)]
    ascending = (*range(15, 8, -1), *range(8))  # of both zeros the positive one
    values = [FP4_VALUES[code] for code in ascending]
    places, scales_Rb = _best_scales(x_RbC, values, candidates, _powers_of_two, importance_K)
    codes = torch.tensor(ascending, dtype=torch.uint8)[places.int()]
    return QuantizedRows(codes.flatten(1), scales_Rb, torch.ones(len(weights_RK)))


def _best_scales(
    x_RbC: Tensor,
    values: Sequence[float],
    candidates: list[Tensor],
    decode: Callable[[Tensor], Tensor],
    importance_K: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """For each block the candidate scale code of least squared error, the first of equals, and its codes."""
    values_c = _floats(values)
    thresholds = (values_c[1:] + values_c[:-1]) / 2
    weight_bC = torch.ones(1) if importance_K is None else importance_K.sqrt().view(-1, BLOCK)
    least = torch.full(x_RbC.shape[:2], torch.inf, dtype=torch.float64)
    codes = torch.zeros(x_RbC.shape, dtype=torch.uint8)
    scales_Rb = torch.zeros(x_RbC.shape[:2], dtype=torch.uint8)
    for candidate in candidates:
        scale = decode(candidate)[..., None]
        found = torch.bucketize(x_RbC * (1 / scale), thresholds, out_int32=True)
        error = _sum_by_halves(((x_RbC - scale * values_c[found]) * weight_bC).double().square_())
        better = error < least
        least = torch.where(better, error, least)
        scales_Rb = torch.where(better, candidate.to(torch.uint8), scales_Rb)
        codes = torch.where(better[..., None], found.to(torch.uint8), codes)
    return codes, scales_Rb


def _sum_by_halves(terms_RbC: Tensor) -> Tensor:
    """Sums of blocks in an order that any machine can repeat: 16 + 16, then 8 + 8, ... 1 + 1."""
    while terms_RbC.shape[2] > 1:
        left, right = terms_RbC.chunk(2, dim=2)
        terms_RbC = left + right
    return terms_RbC.squeeze(2)


def _row_scales(weights_RK: Tensor) -> Tensor:
    """A 64th of the largest |weight| of each row, rounded down to a power of two; at least 2^-100.

    Scales over 127 then fit a minifloat's top, and none is denormal.
    """
    largest_R = weights_RK.abs().amax(dim=1)
    power_R = (largest_R.view(torch.int32) >> 23 << 23).view(torch.float32)
    return (power_R / 64).clamp_(min=_SMALLEST_ROW_SCALE)


def _minifloats(codes: Tensor) -> Tensor:
    """2^((s >> 4) - 15) * (1 + (s & 15) / 16), which is s in the middle of a float32's bits."""
    return ((codes.int() << 19) + (112 << 23)).view(torch.float32)


def _minifloat_codes(numbers: Tensor) -> Tensor:
    """The least code whose minifloat is no smaller than a number of at least 0 (or the last of all)."""
    rounded_up = numbers.view(torch.int32) + (1 << 19) - 1
    return ((rounded_up >> 19) - (112 << 4)).clamp_(0, 255).to(torch.uint8)


def _powers_of_two(codes: Tensor) -> Tensor:
    """E8M0: 2^(s - 127)."""
    return torch.ones(codes.shape).ldexp_(codes.int() - 127)


def _in_blocks(rows_RK: Tensor) -> Tensor:
    return rows_RK.view(len(rows_RK), -1, BLOCK)


def _floats(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)
