"""A sparse feed-forward layer: router, stacked experts, shared experts."""

import torch
from torch import Tensor, nn

from tenfold.config import ModelConfig
from tenfold.kernels import grouped_mm
from tenfold.model.layers import SwiGLU
from tenfold.model.router import Router, RouterAux


class Experts(nn.Module):
    """The weights of all routed experts, stacked."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, D, F = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up = nn.Parameter(torch.empty(E, 2 * F, D))
        self.down = nn.Parameter(torch.empty(E, D, F))

    def forward(self, x_TD: Tensor, expert_ids_TK: Tensor, expert_weights_TK: Tensor) -> Tensor:
        out_TD: Tensor = grouped_mm.experts(
            x_TD, self.gate_up, self.down, expert_ids_TK, expert_weights_TK, "silu"
        )
        return out_TD


class SparseMoE(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        shared_width = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = SwiGLU(config.hidden_size, shared_width) if shared_width else None

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, RouterAux]:
        ids, weights, aux = self.router(x_BSD)
        out_BSD = self.experts(x_BSD.flatten(0, 1), ids, weights).view_as(x_BSD)
        if self.shared_experts is not None:
            out_BSD = out_BSD + self.shared_experts(x_BSD)
        return out_BSD, aux
