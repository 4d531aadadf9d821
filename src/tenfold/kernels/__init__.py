"""How experts are computed: one signature, several backends.

    experts(x_TD, gate_up, down, expert_ids_TK, expert_weights_TK, activation,
            gate_up_bias, down_bias) -> out_TD

`gate_up (E, 2F, D)`, `down (E, D, F)` and the biases, `(E, 2F)` and `(E, D)` or None, are stacked
over experts. An activation without a gate (`relu`) takes `(E, F, D)` for `gate_up`, and biases to match.
An expert id of -1 is an empty slot: a dropped token (Switch) or a place no expert took (expert choice).
It adds nothing.

Shape suffixes, the one legend of the project: `B` batch, `S` sequence, `T` tokens (B*S), `D` model
width, `H` heads, `F` expert width, `E` experts, `K` experts per token, `V` vocabulary. A lower-case
suffix names something local.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

EMPTY_SLOT = -1
SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, for a last axis that holds gate then up (Shazeer 2020, arXiv:2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def clamped_swiglu(gate_up: Tensor) -> Tensor:
    """gpt-oss's: gate and up clamped, a steeper sigmoid, and one added to up.

    Constants from OpenAI's published model code (swiglu, alpha and limit).
    """
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=SWIGLU_LIMIT)
    up = up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": swiglu,
    "clamped_swiglu": clamped_swiglu,
    "relu": F.relu,
}


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype matrices are multiplied in: autocast's where it is on, else that of `x`."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
