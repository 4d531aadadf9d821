"""The truth that every backend is tested against: a readable loop over experts."""

import torch
from torch import Tensor

from tenfold.kernels import ACTIVATIONS


def experts(
    x_TD: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_ids_TK: Tensor,
    expert_weights_TK: Tensor,
    activation: str = "silu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Each token's chosen experts, weighted and summed. Returns (T, D) in the dtype of `x_TD`."""
    out_TD = torch.zeros_like(x_TD)
    for expert in range(gate_up.shape[0]):
        token, slot = torch.where(expert_ids_TK == expert)
        wide = x_TD[token] @ gate_up[expert].T
        if gate_up_bias is not None:
            wide = wide + gate_up_bias[expert]
        y = ACTIVATIONS[activation](wide) @ down[expert].T
        if down_bias is not None:
            y = y + down_bias[expert]
        y = y * expert_weights_TK[token, slot, None].to(x_TD.dtype)
        out_TD = out_TD.index_add(0, token, y)
    return out_TD
