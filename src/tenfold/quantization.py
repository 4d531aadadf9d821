"""Quantised weights back to floating point: pure functions on tensors."""

import torch
from torch import Tensor

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the sixteen codes of E2M1 stand for (OCP Microscaling Formats 1.0, table 5)."""

MXFP4_BLOCK = 32
"""Weights that share one scale."""


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
