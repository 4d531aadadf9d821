"""The feed-forward layers of a Switch Transformer (Fedus et al. 2021, arXiv:2101.03961)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold.kernels import EMPTY_SLOT, grouped_mm
from tenfold.model.router import RouterAux, count
from tenfold.switch_config import SwitchConfig


class ReluMLP(nn.Module):
    """A dense layer."""

    def __init__(self, config: SwitchConfig):
        super().__init__()
        self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.wo(F.relu(self.wi(x)))
        return out


class Top1Router(nn.Module):
    """Each token's likeliest expert, weighted by its probability, while the expert has room.

    An expert takes the first `expert_capacity` of a sequence's tokens that ask for it, in training
    and at inference alike, as in transformers; later ones get nothing from the layer. Three things
    follow from that rule or differ from other implementations:
    - The sequence is what one call is given. Decoding with a cache gives one token at a time and so
      never drops, where reading the same text at once may.
    - Padding takes no room, so that a padded prompt is routed as it is alone. In transformers it
      does, which shows where padding comes first and an expert is full.
    - The paper's noise on the router's input while training (jitter) is left out.
    """

    def __init__(self, config: SwitchConfig):
        super().__init__()
        self.capacity = config.expert_capacity
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.d_model))
        self.bias: nn.Parameter | None
        bias = nn.Parameter(torch.zeros(config.num_experts)) if config.router_bias else None
        self.register_parameter("bias", bias)

    def forward(self, x_BSD: Tensor, real_BS: Tensor | None) -> tuple[Tensor, Tensor, RouterAux]:
        """In float32. `real_BS` is False at padding, which gets no expert."""
        experts = len(self.weight)
        with torch.autocast(x_BSD.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            logits_BSE = F.linear(x_BSD.float(), self.weight.float(), bias)
            probs_BSE = logits_BSE.softmax(-1)
        weights_BS, asked_BS = probs_BSE.max(-1)
        if real_BS is not None:
            asked_BS = asked_BS.masked_fill(~real_BS, EMPTY_SLOT)
        asks_BSE = asked_BS[..., None] == torch.arange(experts, device=asked_BS.device)
        over_BS = (asks_BSE & (asks_BSE.cumsum(1) > self.capacity)).any(-1)
        asked_T1 = asked_BS.flatten()[:, None]
        ids_T1 = asked_T1.masked_fill(over_BS.flatten()[:, None], EMPTY_SLOT)
        logits_TE, probs_TE = logits_BSE.flatten(0, 1), probs_BSE.flatten(0, 1)
        load_E = count(asked_T1, experts)
        aux = RouterAux(logits_TE, probs_TE, load_E, over_BS.sum(), asked_T1, len(x_BSD))
        return ids_T1, weights_BS.flatten()[:, None], aux


class ReluExperts(nn.Module):
    """The weights of all experts, stacked: wi (E, F, D) and wo (E, D, F)."""

    def __init__(self, config: SwitchConfig):
        super().__init__()
        experts, width, hidden = config.num_experts, config.d_model, config.d_ff
        self.wi = nn.Parameter(torch.empty(experts, hidden, width))
        self.wo = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, x_TD: Tensor, expert_ids_T1: Tensor, expert_weights_T1: Tensor) -> Tensor:
        return grouped_mm.experts(x_TD, self.wi, self.wo, expert_ids_T1, expert_weights_T1, activation="relu")


class SwitchMoE(nn.Module):
    """A sparse layer."""

    def __init__(self, config: SwitchConfig):
        super().__init__()
        self.router = Top1Router(config)
        self.experts = ReluExperts(config)

    def forward(self, x_BSD: Tensor, real_BS: Tensor | None) -> tuple[Tensor, RouterAux]:
        ids, weights, aux = self.router(x_BSD, real_BS)
        return self.experts(x_BSD.flatten(0, 1), ids, weights).view_as(x_BSD), aux
