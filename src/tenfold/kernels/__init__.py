"""How experts are computed: one signature, several backends.

    experts(x_TD, gate_up, down, expert_ids_TK, expert_weights_TK, activation) -> out_TD

`gate_up (E, 2F, D)` and `down (E, D, F)` are stacked over experts. An expert id of -1 is an empty
slot: a dropped token (Switch) or a place no expert took (expert choice). It adds nothing.

Shape suffixes, the one legend of the project: `B` batch, `S` sequence, `T` tokens (B*S), `D` model
width, `H` heads, `F` expert width, `E` experts, `K` experts per token, `V` vocabulary. A lower-case
suffix names something local.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

EMPTY_SLOT = -1


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, for a last axis that holds gate then up (Shazeer 2020, arXiv:2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": swiglu}


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype matrices are multiplied in: autocast's where it is on, else that of `x`."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
