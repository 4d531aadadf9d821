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
) -> Tensor:
    """Each token's chosen experts, weighted and summed. Returns (T, D) in the dtype of `x_TD`."""
    out_TD = torch.zeros_like(x_TD)
    for expert in range(gate_up.shape[0]):
        token, slot = torch.where(expert_ids_TK == expert)
        hidden = ACTIVATIONS[activation](x_TD[token] @ gate_up[expert].T)
        y = (hidden @ down[expert].T) * expert_weights_TK[token, slot, None].to(x_TD.dtype)
        out_TD = out_TD.index_add(0, token, y)
    return out_TD
