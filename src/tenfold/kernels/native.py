"""Products with packed weights through the compiled kernels, for whoever has tensors.

`tenfold._native` takes addresses; here they come from tensors whose dtype, shape and layout are checked.
"""

from typing import Any

import torch
from torch import Tensor

from tenfold.checkpoint.pack.record import record_bytes
from tenfold.compiled import module
from tenfold.errors import TenfoldError
from tenfold.packed import PackedExperts, PackedMatrix, StreamedExperts
from tenfold.panels import FORMATS, matrix_bytes


def linear(matrix: PackedMatrix, x_TK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x W^T + bias in float32, (T, N). Activations are rounded to 8 bits (bf16 for a bf16 matrix)."""
    x_TK = _floats(x_TK, (-1, matrix.columns))
    y_TN = torch.empty(len(x_TK), matrix.rows)
    bias_N = None if bias_N is None else _floats(bias_N, (matrix.rows,))
    new_linear(matrix, bias_N)(x_TK.data_ptr(), len(x_TK), y_TN.data_ptr())
    return y_TN


def experts(
    packed: PackedExperts,
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    expert_weights_TK: Tensor,
    activation: str = "silu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """As every backend of `tenfold.kernels`, from packed weights; (T, D) in float32."""
    E, D, F = len(packed.records), packed.hidden_size, packed.width
    x_TD = _floats(x_TD, (-1, D))
    ids, weights = expert_ids_TK.int().contiguous(), _floats(expert_weights_TK, expert_ids_TK.shape)
    if (ids.numel() and (ids.max() >= E or ids.min() < -1)) or len(ids) != len(x_TD):
        wanted = f"({len(x_TD)}, top-k), with ids from -1 to {E - 1}"
        raise TenfoldError(f"expert_ids_TK of shape {tuple(ids.shape)} must be {wanted}")
    biases = [
        None if bias is None else _floats(bias, (E, width))
        for bias, width in ((gate_up_bias, 2 * F), (down_bias, D))
    ]
    out_TD = torch.empty(len(x_TD), D)
    new_experts(packed, activation, *biases)(
        x_TD.data_ptr(), len(x_TD), ids.data_ptr(), weights.data_ptr(), ids.shape[1], out_TD.data_ptr()
    )
    return out_TD


def new_linear(matrix: PackedMatrix, bias_N: Tensor | None = None) -> Any:
    """The compiled form of a matrix; it holds addresses, so both tensors must outlive it."""
    form = FORMATS.index(matrix.format)
    _check_bytes(matrix.panels, matrix_bytes(matrix.format, matrix.rows, matrix.columns))
    return module().Linear(matrix.panels.data_ptr(), form, matrix.rows, matrix.columns, address(bias_N))


def new_experts(
    packed: PackedExperts | StreamedExperts,
    activation: str,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> Any:
    """The compiled form of a layer's experts; tensors and store must outlive it, for it holds addresses."""
    form, biases = FORMATS.index(packed.format), (address(gate_up_bias), address(down_bias))
    last = (packed.width, packed.hidden_size, *biases, activation == "clamped_swiglu")
    if isinstance(packed, StreamedExperts):
        return module().Experts.streamed(packed.store.native, packed.layer, form, packed.count, *last)
    size = record_bytes(packed.format, packed.hidden_size, packed.width)
    _check_bytes(packed.records.view(-1), len(packed.records) * size)
    return module().Experts(packed.records.data_ptr(), size, form, len(packed.records), *last)


def address(tensor: Tensor | None) -> int:
    """Of a contiguous float32 tensor on the CPU; 0 for None."""
    if tensor is None:
        return 0
    assert tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.device.type == "cpu"
    return tensor.data_ptr()


def _check_bytes(packed: Tensor, size: int) -> None:
    assert packed.dtype == torch.uint8 and packed.shape == (size,) and packed.is_contiguous()


def _floats(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).reshape(shape).contiguous()
