"""A sparse feed-forward layer: router, stacked experts, shared experts."""

import torch
from torch import Tensor, nn

from tenfold.config import ModelConfig
from tenfold.kernels import grouped_mm
from tenfold.model.layers import SwiGLU
from tenfold.model.router import Router, RouterAux


class Experts(nn.Module):
    """The weights of all routed experts, stacked."""

    gate_up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, D, F = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up = nn.Parameter(torch.empty(E, 2 * F, D))
        self.down = nn.Parameter(torch.empty(E, D, F))
        self.activation = config.hidden_act
        self.register_parameter("gate_up_bias", _zeros(E, 2 * F) if config.moe_bias else None)
        self.register_parameter("down_bias", _zeros(E, D) if config.moe_bias else None)

    def forward(self, x_TD: Tensor, expert_ids_TK: Tensor, expert_weights_TK: Tensor) -> Tensor:
        return grouped_mm.experts(
            x_TD,
            self.gate_up,
            self.down,
            expert_ids_TK,
            expert_weights_TK,
            self.activation,
            self.gate_up_bias,
            self.down_bias,
        )


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


class SparseMoE(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        D, width = config.hidden_size, config.shared_width
        self.shared_experts = SwiGLU(D, width, config.mlp_bias) if width else None
        self.shared_expert_gate = nn.Linear(D, 1, bias=False) if config.shared_expert_gate else None

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, RouterAux]:
        ids, weights, aux = self.router(x_BSD)
        out_BSD = self.experts(x_BSD.flatten(0, 1), ids, weights).view_as(x_BSD)
        if self.shared_experts is not None:
            out_BSD = out_BSD + self._shared(x_BSD)
        return out_BSD, aux

    def _shared(self, x_BSD: Tensor) -> Tensor:
        assert self.shared_experts is not None
        shared_BSD: Tensor = self.shared_experts(x_BSD)
        if self.shared_expert_gate is None:
            return shared_BSD
        gated_BSD: Tensor = self.shared_expert_gate(x_BSD).sigmoid() * shared_BSD
        return gated_BSD
