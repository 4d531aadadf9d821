"""Which experts a token uses, and with what weight.

Every router computes in float32 and returns `(expert_ids_TK, expert_weights_TK, aux)`. Selection
and weighting are separate: a bias may change which experts are chosen, never how they are weighted.
An id of -1 is an empty slot.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold.config import ModelConfig
from tenfold.kernels import EMPTY_SLOT


@dataclass
class RouterAux:
    """What balance losses and metrics need from one sparse layer, for T tokens in `batch` sequences."""

    logits_TE: Tensor
    probs_TE: Tensor
    """Scores that sum to one over the experts: attached to the graph, for the losses."""
    load_E: Tensor
    """Tokens each expert was asked to take, before any are dropped."""
    dropped: Tensor
    """Token-expert pairs that found their expert full."""
    expert_ids_TK: Tensor
    """As chosen, before any are dropped."""
    batch: int


Choice = tuple[Tensor, Tensor]
"""expert_ids_TK and expert_weights_TK."""


class Router(nn.Module):
    """A float32 linear layer (E, D) and one of the ways to choose below."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.bias: Tensor
        self.logit_bias: nn.Parameter | None
        if config.router == "sigmoid":
            self.register_buffer("bias", torch.zeros(config.num_experts))
        logit_bias = nn.Parameter(torch.zeros(config.num_experts)) if config.moe_bias else None
        self.register_parameter("logit_bias", logit_bias)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, RouterAux]:
        x_TD = x_BSD.flatten(0, 1)
        with torch.autocast(x_TD.device.type, enabled=False):
            bias = None if self.logit_bias is None else self.logit_bias.float()
            logits_TE = F.linear(x_TD.float(), self.weight.float(), bias)
            scores_TE = logits_TE.sigmoid() if self.config.router == "sigmoid" else logits_TE.softmax(-1)
            ids, weights = _CHOOSE[self.config.router](self, scores_TE)
        load_E, dropped = count(ids, self.config.num_experts), ids.new_zeros(())
        asked = ids
        if self.config.router == "switch" and self.training:
            ids, dropped = drop_over_capacity(ids, load_E, self.config.capacity_factor)
        probs_TE = scores_TE
        if self.config.router == "sigmoid":
            probs_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=1e-20)
        return ids, weights, RouterAux(logits_TE, probs_TE, load_E, dropped, asked, len(x_BSD))

    def softmax_topk(self, probs_TE: Tensor) -> Choice:
        """Top-k of the softmax over all experts (OLMoE, Qwen3-MoE), or of the groups that hold the
        likeliest ones (DeepSeek-V2, arXiv:2405.04434, section 2.2.2)."""
        allowed_TE = self._only_best_groups(probs_TE, ranked_by=1)
        weights, ids = allowed_TE.topk(self.config.num_experts_per_tok, dim=-1)
        return ids, self._scaled(weights, self.config.norm_topk_prob)

    def topk_softmax(self, probs_TE: Tensor) -> Choice:
        """Softmax over the top-k logits alone (Mixtral, gpt-oss): the same as renormalising."""
        weights, ids = probs_TE.topk(self.config.num_experts_per_tok, dim=-1)
        return ids, self._scaled(weights, renormalise=True)

    def sigmoid_topk(self, scores_TE: Tensor) -> Choice:
        """Sigmoid scores, a bias and groups for the selection only (DeepSeek-V3, arXiv:2412.19437)."""
        ranked_TE = self._only_best_groups(scores_TE + self.bias, ranked_by=2)
        ids = ranked_TE.topk(self.config.num_experts_per_tok, dim=-1).indices
        return ids, self._scaled(scores_TE.gather(-1, ids), self.config.norm_topk_prob)

    def _only_best_groups(self, ranked_TE: Tensor, ranked_by: int) -> Tensor:
        """Rule out the experts outside the `topk_group` groups whose `ranked_by` best sum highest."""
        groups = self.config.n_group
        if groups == 1:
            return ranked_TE
        grouped: Tensor = ranked_TE.unflatten(-1, (groups, -1))
        best = grouped.topk(ranked_by, dim=-1).values.sum(-1).topk(self.config.topk_group, dim=-1).indices
        allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, True)
        return grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)

    def switch_top1(self, probs_TE: Tensor) -> Choice:
        """Top-1, weighted by its own probability (Switch Transformer, arXiv:2101.03961)."""
        weights, ids = probs_TE.max(-1, keepdim=True)
        return ids, weights

    def expert_choice(self, probs_TE: Tensor) -> Choice:
        """Each expert takes its T·K/E best tokens (Zhou et al. 2022, arXiv:2202.09368).

        A token's experts depend on the tokens after it, so this trains but cannot generate.
        """
        tokens, experts = probs_TE.shape
        room = -(-tokens * self.config.num_experts_per_tok // experts)
        taken_CE = probs_TE.topk(min(room, tokens), dim=0).indices
        chosen_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter(0, taken_CE, True)
        slots = int(chosen_TE.sum(-1).max())
        weights, ids = probs_TE.masked_fill(~chosen_TE, 0.0).topk(slots, dim=-1)
        empty = ~chosen_TE.gather(-1, ids)
        return ids.masked_fill(empty, EMPTY_SLOT), weights.masked_fill(empty, 0.0)

    def _scaled(self, weights_TK: Tensor, renormalise: bool) -> Tensor:
        if renormalise:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return weights_TK * self.config.routed_scaling_factor


_CHOOSE: dict[str, Callable[[Router, Tensor], Choice]] = {
    "softmax": Router.softmax_topk,
    "topk_softmax": Router.topk_softmax,
    "sigmoid": Router.sigmoid_topk,
    "switch": Router.switch_top1,
    "expert_choice": Router.expert_choice,
}


def count(expert_ids: Tensor, num_experts: int) -> Tensor:
    """How many slots name each expert, empty slots left out. Returns (E,) int64."""
    return (expert_ids.flatten() + 1).bincount(minlength=num_experts + 1)[1:]


def drop_over_capacity(
    expert_ids_T1: Tensor, load_E: Tensor, capacity_factor: float
) -> tuple[Tensor, Tensor]:
    """Empty the slots of tokens that come after their expert is full, in order of position.

    An expert has room for ceil(capacity_factor * T / E) tokens (Switch Transformer, eq. 3).
    Only training drops: at inference every token is served, so that cached and uncached decoding agree.
    """
    ids_T = expert_ids_T1.flatten()
    capacity = math.ceil(capacity_factor * len(ids_T) / len(load_E))
    order = ids_T.argsort(stable=True)
    first_of_expert = load_E.cumsum(0) - load_E
    place = torch.empty_like(ids_T)
    place[order] = torch.arange(len(ids_T), device=ids_T.device) - first_of_expert[ids_T[order]]
    over = place >= capacity
    return ids_T.masked_fill(over, EMPTY_SLOT)[:, None], over.sum()
