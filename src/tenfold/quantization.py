"""Weights to codes and scales and back: pure functions on tensors. `panels` lays the codes out.

q8, q4 and mxfp4 are blocks of 32 columns of a row that share a scale byte s. A weight is scale * value:

| format | value of a code | scale |
|---|---|---|
| q8 | code - 128, in -127..127 | row scale * minifloat of s, positive |
| q4 | `Q4_VALUES[code]` | row scale * minifloat of s |
| mxfp4 | `FP4_VALUES[code]` | 2^(s - 127) (OCP Microscaling Formats 1.0) |

The minifloat is 2^((s >> 4 & 7) - 7) * (1 + (s & 15) / 16), and negative where s >= 128. Row scales are
powers of two, which makes every q8 and q4 weight exact in float32, however it is multiplied out.

Quantising is defined to the bit, so that a faster quantiser can be compared with this one. All of it is
float32 arithmetic, rounded to nearest even, but for the sums of squared errors, see `_best_scales`.

Suffixes: R rows of K columns, which are b blocks of C columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the sixteen codes of E2M1 stand for (OCP Microscaling Formats 1.0, table 5)."""

Q4_VALUES = (-127, -95, -73, -57, -43, -31, -19, -9, 0, 10, 21, 32, 46, 61, 79, 101)
"""Fitted with the scale search by Lloyd's algorithm: two parts of Gaussian blocks, one of Student's t (5).

Zero is pinned. One end is longer, and the sign of the scale turns it to where a block needs it (LOG.md).
"""

BLOCK = 32
"""Weights that share one scale."""

QUANTIZED = ("q8", "q4", "mxfp4")

_Q4_STEPS = range(-4, 6)
"""Scale codes tried, of either sign, around the one that brings the largest weight to 127."""

_SMALLEST_ROW_SCALE = 2.0**-100
_NEGATIVE = 128


@dataclass(frozen=True)
class QuantizedRows:
    """Rows of whole blocks."""

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
    if form == "mxfp4":
        return (_powers_of_two(rows.scales_Rb)[..., None] * _floats(FP4_VALUES)[codes.int()]).flatten(1)
    values = codes.float() - 128 if form == "q8" else _floats(Q4_VALUES)[codes.int()]
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
    """The scale is the largest |weight| of the block over 127, rounded up: no code is cut short.

    Values are x * (1 / scale), rounded.
    """
    row_scales_R = _row_scales(weights_RK)
    x_RbC = _in_blocks(weights_RK / row_scales_R[:, None])
    scales_Rb = _scale_codes(x_RbC)
    codes = (x_RbC * (1 / _minifloats(scales_Rb))[..., None]).round_().clamp_(-127, 127) + 128
    return QuantizedRows(codes.to(torch.uint8).flatten(1), scales_Rb.to(torch.uint8), row_scales_R)


def _quantize_q4(weights_RK: Tensor, importance_K: Tensor | None) -> QuantizedRows:
    """The best of 20 scales: q8's and its neighbours, positive ones first, each sign from the smallest up."""
    row_scales_R = _row_scales(weights_RK)
    x_RbC = _in_blocks(weights_RK / row_scales_R[:, None])
    near_Rb = [(_scale_codes(x_RbC) + step).clamp_(0, 127) for step in _Q4_STEPS]
    candidates = near_Rb + [scales_Rb | _NEGATIVE for scales_Rb in near_Rb]
    codes_RbC, scales_Rb = _best_scales(x_RbC, Q4_VALUES, candidates, _minifloats, importance_K)
    return QuantizedRows(codes_RbC.flatten(1), scales_Rb, row_scales_R)


def _quantize_mxfp4(weights_RK: Tensor, importance_K: Tensor | None) -> QuantizedRows:
    """The better of two exponents: OCP's (section 6.3), and the next, which does not cut 7 to 6.

    Weights that came from MXFP4 keep their values: OCP's makes no error on them. Weights and values are
    doubled, which makes values whole numbers.
    """
    x_RbC = _in_blocks(2 * weights_RK)
    exponents_Rb = (_in_blocks(weights_RK).abs().amax(dim=2).view(torch.int32) >> 23) - 2
    candidates = [(exponents_Rb + step).clamp_(0, 254) for step in (0, 1)]
    ascending = (*range(15, 8, -1), *range(8))  # codes by value; of the two zeros the positive one
    values = [int(2 * FP4_VALUES[code]) for code in ascending]
    places_RbC, scales_Rb = _best_scales(x_RbC, values, candidates, _powers_of_two, importance_K)
    codes_RbC = torch.tensor(ascending, dtype=torch.uint8)[places_RbC.int()]
    return QuantizedRows(codes_RbC.flatten(1), scales_Rb, torch.ones(len(weights_RK)))


def _best_scales(
    x_RbC: Tensor,
    values: Sequence[int],
    candidates: Sequence[Tensor],
    decode: Callable[[Tensor], Tensor],
    importance_K: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """For each block the first scale byte of least squared error among the candidates, and its codes.

    Codes are places in `values`, which ascend within int8. The nearest to y = x * (1 / scale), both rounded
    to float32, is the number of midpoints of neighbours that are <= y. The error of one weight is
    x - scale * value, exact but for one rounding to float32, and times the float32 square root of its
    importance, rounded again; its square is exact in float64, and squares are added up by halves.
    """
    code_table = _nearest_table(values)
    value_table = _floats(values)[code_table.int()]
    root_bC = None if importance_K is None else _in_blocks(importance_K[None]).sqrt()
    least = torch.full(x_RbC.shape[:2], torch.inf, dtype=torch.float64)
    scales_Rb = candidates[0].to(torch.uint8)
    for candidate in candidates:
        scale = decode(candidate)[..., None]
        error = x_RbC - scale * _look_up(value_table, x_RbC, scale)
        if root_bC is not None:
            error *= root_bC
        total = _sum_by_halves(error.double().square_())
        better = total < least
        least = torch.where(better, total, least)
        scales_Rb = torch.where(better, candidate.to(torch.uint8), scales_Rb)
    return _look_up(code_table, x_RbC, decode(scales_Rb)[..., None]), scales_Rb


def _nearest_table(values: Sequence[int]) -> Tensor:
    """The code for every y of int8's range by halves: midpoints of whole numbers lie on halves."""
    values_c = _floats(values)
    midpoints = (values_c[1:] + values_c[:-1]) / 2
    return torch.bucketize(torch.arange(-256, 256) / 2, midpoints, right=True).to(torch.uint8)


def _look_up(table: Tensor, x_RbC: Tensor, scale: Tensor) -> Tensor:
    half_steps = (x_RbC * (1 / scale)).mul_(2).floor_().clamp_(-256, 255).int().add_(256)
    return table.index_select(0, half_steps.flatten()).view(x_RbC.shape)


def _sum_by_halves(terms_RbC: Tensor) -> Tensor:
    """Sums of blocks in an order that any machine can repeat: 16 + 16, then 8 + 8, ... 1 + 1."""
    while terms_RbC.shape[2] > 1:
        left, right = terms_RbC.chunk(2, dim=2)
        terms_RbC = left + right
    return terms_RbC.squeeze(2)


def _row_scales(weights_RK: Tensor) -> Tensor:
    """A 64th of the largest |weight| of each row, rounded down to a power of two; at least 2^-100.

    It leaves the scale search room above the largest weight over 127, and no scale is denormal.
    """
    largest_R = weights_RK.abs().amax(dim=1)
    power_R = (largest_R.view(torch.int32) >> 23 << 23).view(torch.float32)
    return (power_R / 64).clamp_(min=_SMALLEST_ROW_SCALE)


def _minifloats(codes: Tensor) -> Tensor:
    """Scale bytes to float32: exponent and fraction are seven bits in the middle of a float32's."""
    magnitudes = ((codes.int() & 127) << 19) + (120 << 23)
    return torch.where(codes < _NEGATIVE, 1.0, -1.0) * magnitudes.view(torch.float32)


def _scale_codes(x_RbC: Tensor) -> Tensor:
    """The least positive scale byte (int32) that is no less than each block's largest |x| over 127."""
    scale_Rb = x_RbC.abs().amax(dim=2) / 127
    rounded_up = scale_Rb.view(torch.int32) + (1 << 19) - 1
    return ((rounded_up >> 19) - (120 << 4)).clamp_(0, 127)


def _powers_of_two(codes: Tensor) -> Tensor:
    """E8M0: 2^(s - 127)."""
    return torch.ones(codes.shape).ldexp_(codes.int() - 127)


def _in_blocks(rows_RK: Tensor) -> Tensor:
    return rows_RK.view(len(rows_RK), -1, BLOCK)


def _floats(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)
