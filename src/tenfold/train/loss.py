"""The language-model loss and its gradient, the head a piece at a time.

The logits of a whole micro-batch would be the largest tensor of a step, and on the CPU mostly page
faults (LOG.md).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.device import autocast
from tenfold.model.router import RouterAux
from tenfold.model.transformer import Transformer
from tenfold.train import balance
from tenfold.train.settings import TrainSettings

HEAD_TOKENS = 1024


def backward(
    model: Transformer, inputs_BS: Tensor, targets_BS: Tensor, settings: TrainSettings
) -> tuple[list[RouterAux], dict[str, float]]:
    """Add one micro-batch's gradient.

    Returns what the routers did, and the micro-batch's share of the step's losses: `loss` and, where
    the model predicts further ahead, `mtp_loss` (cross-entropy, nats per token); `balance_loss`.
    """
    share = len(inputs_BS) / settings.batch_size
    with autocast(inputs_BS.device, settings.precision):
        hidden_BSD, layers = model.hidden_states(inputs_BS)
        states = {"loss": (hidden_BSD, targets_BS, 1.0)}
        if model.mtp and settings.mtp_loss:
            ahead_BSD, ahead_layers = model.states_ahead(hidden_BSD, inputs_BS)
            states["mtp_loss"] = (ahead_BSD, targets_BS[:, 1:], settings.mtp_loss)
            layers = layers + ahead_layers
    losses: dict[str, float] = {}
    roots: list[Tensor] = []
    gradients: list[Tensor | None] = []
    for name, (state_BSD, wanted_BS, weight) in states.items():
        nats, gradient = _head(model, state_BSD, wanted_BS, weight * share, settings.precision)
        losses[name] = share * nats
        roots.append(state_BSD)
        gradients.append(gradient)
    balance_loss = share * balance.total_loss(layers, settings)
    if balance_loss.requires_grad:
        roots.append(balance_loss)
        gradients.append(None)
    torch.autograd.backward(roots, gradients)
    return layers, losses | {"balance_loss": balance_loss.item()}


def _head(
    model: Transformer, state_BSD: Tensor, targets_BS: Tensor, weight: float, precision: str
) -> tuple[float, Tensor | None]:
    """Mean cross-entropy, and `weight` times its gradient at the states; the head's own is added to it."""
    leaf_BSD, nats = state_BSD.detach().requires_grad_(), 0.0
    for piece in nats_by_piece(model, leaf_BSD, targets_BS, precision):
        mean = piece / targets_BS.numel()
        (mean * weight).backward()
        nats += mean.item()
    return nats, leaf_BSD.grad


def nats_by_piece(
    model: Transformer, hidden_BSD: Tensor, targets_BS: Tensor, precision: str
) -> Iterator[Tensor]:
    """Summed cross-entropy of each thousand tokens."""
    pieces = hidden_BSD.flatten(0, 1).split(HEAD_TOKENS)
    for hidden, targets in zip(pieces, targets_BS.flatten().split(HEAD_TOKENS), strict=True):
        with autocast(hidden.device, precision):
            logits = model.logits(hidden)
        yield F.cross_entropy(logits.float(), targets, reduction="sum")
