"""A loss for routers whose experts are to be streamed: what a token uses, the tokens after it use again."""

import torch
from torch import Tensor

from tenfold.model.router import RouterAux

MEMORY_TOKENS = 8
"""Over which a use is remembered, on average."""


def locality_loss(aux: RouterAux) -> Tensor:
    """How little of a token's probability goes to experts that its own text, more than others, used of late.

    1 - mean_t Σ_e P_te (R_te - R_e). R_te, the recent use, is the exponentially weighted share of the tokens
    before t in its sequence that chose e, which is what a store that lets go of the least used holds, but
    smooth; R_e is its mean over the batch. Without it the least loss would be that of a router that chooses
    the same few experts for all. The gradient reaches P alone: tokens are drawn to what was used before them.
    """
    probs_BSE = aux.probs_TE.unflatten(0, (aux.batch, -1))
    with torch.no_grad():
        recent_BSE = _decay(probs_BSE.shape[1], probs_BSE) @ _chosen(aux).view_as(probs_BSE)
        recent_BSE -= recent_BSE.mean((0, 1))
    reused_BS: Tensor = (probs_BSE * recent_BSE).sum(-1)
    return 1 - reused_BS.mean()


def _chosen(aux: RouterAux) -> Tensor:
    """1 for the experts that a token chose, (T, E); empty slots name none."""
    with_none = aux.probs_TE.new_zeros(len(aux.probs_TE), aux.probs_TE.shape[1] + 1)
    return with_none.scatter_(1, aux.expert_ids_TK + 1, 1.0)[:, 1:]


def _decay(size: int, like: Tensor) -> Tensor:
    """What each of `size` tokens (row) makes of those before it (column): weights whose sum nears 1."""
    keep = 1 - 1 / MEMORY_TOKENS
    ages = torch.arange(size, device=like.device)
    age = ages[:, None] - ages - 1
    return torch.where(age < 0, 0.0, (1 - keep) * keep ** age.clamp(min=0)).to(like.dtype)
