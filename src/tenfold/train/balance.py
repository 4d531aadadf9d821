"""Keeping experts evenly used: losses on what the routers did, and the aux-loss-free bias.

Losses are computed for each layer and then averaged: pooled over layers they would hide a collapsed one.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tenfold.model.router import Router, RouterAux, count
from tenfold.model.transformer import Transformer
from tenfold.train.locality import locality_loss
from tenfold.train.settings import TrainSettings


def load_balancing_loss(aux: RouterAux) -> Tensor:
    """E · Σ f_e P_e, least (1) when both are uniform (Switch Transformer, arXiv:2101.03961, eq. 4)."""
    share_E = aux.load_E / aux.load_E.sum().clamp(min=1)
    return len(share_E) * (share_E * aux.probs_TE.mean(0)).sum()


def sequence_loss(aux: RouterAux) -> Tensor:
    """The same within each sequence, then averaged (DeepSeek-V3, arXiv:2412.19437, eq. 17-20)."""
    E = aux.probs_TE.shape[-1]
    load_BE = torch.stack([count(ids, E) for ids in aux.expert_ids_TK.chunk(aux.batch)])
    share_BE = load_BE / load_BE.sum(-1, keepdim=True).clamp(min=1)
    probs_BE = torch.stack([probs.mean(0) for probs in aux.probs_TE.chunk(aux.batch)])
    return E * (share_BE * probs_BE).sum(-1).mean()


def z_loss(aux: RouterAux) -> Tensor:
    """Mean squared log-sum-exp of the logits, against their drift (ST-MoE, arXiv:2202.08906, eq. 5)."""
    return aux.logits_TE.logsumexp(-1).square().mean()


def total_loss(layers: Sequence[RouterAux], settings: TrainSettings) -> Tensor:
    """The weighted losses, averaged over the sparse layers; 0 for a dense model."""
    terms: tuple[tuple[float, Callable[[RouterAux], Tensor]], ...] = (
        (settings.balance_loss, load_balancing_loss),
        (settings.sequence_loss, sequence_loss),
        (settings.z_loss, z_loss),
        (settings.locality_loss, locality_loss),
    )
    if not layers:
        return torch.zeros(())
    total = torch.zeros((), device=layers[0].logits_TE.device)
    for weight, loss in terms:
        if weight:
            total = total + weight * torch.stack([loss(aux) for aux in layers]).mean()
    return total


def routers(model: Transformer) -> list[Router]:
    """The routers, in order of depth: that of the aux lists."""
    return [module for module in model.modules() if isinstance(module, Router)]


class BiasUpdate:
    """Aux-loss-free balancing (Wang et al. 2024, arXiv:2408.15664), run as a hook of the optimizer.

    After each step the selection bias of an expert that had more than its share falls by `rate`,
    that of one that had less rises by it. Whoever runs the step sets `loads` before it.
    """

    def __init__(self, model: Transformer, rate: float):
        self.routers = routers(model)
        self.rate = rate
        self.loads: list[Tensor] = []
        """Tokens per expert in the step, for each router, over all its micro-batches."""

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_post_hook(lambda *_: self._update())

    def _update(self) -> None:
        for router, load_E in zip(self.routers, self.loads, strict=True):
            load = load_E.float()
            router.bias += self.rate * torch.sign(load.mean() - load)
