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
) -> tuple[list[RouterAux], float, float]:
    """Add one micro-batch's gradient.

    Returns what the routers did, and the micro-batch's share of the step's two losses: cross-entropy
    (nats per token) and balance.
    """
    share = len(inputs_BS) / settings.batch_size
    with autocast(inputs_BS.device, settings.precision):
        hidden_BSD, layers = model.hidden_states(inputs_BS)
    leaf_BSD, loss = hidden_BSD.detach().requires_grad_(), 0.0
    for nats in nats_by_piece(model, leaf_BSD, targets_BS, settings.precision):
        part = nats * (share / targets_BS.numel())
        part.backward()
        loss += part.item()
    balance_loss = share * balance.total_loss(layers, settings)
    if balance_loss.requires_grad:
        torch.autograd.backward([hidden_BSD, balance_loss], [leaf_BSD.grad, None])
    else:
        hidden_BSD.backward(leaf_BSD.grad)
    return layers, loss, balance_loss.item()


def nats_by_piece(
    model: Transformer, hidden_BSD: Tensor, targets_BS: Tensor, precision: str
) -> Iterator[Tensor]:
    """Summed cross-entropy of each thousand tokens."""
    pieces = hidden_BSD.flatten(0, 1).split(HEAD_TOKENS)
    for hidden, targets in zip(pieces, targets_BS.flatten().split(HEAD_TOKENS), strict=True):
        with autocast(hidden.device, precision):
            logits = model.logits(hidden)
        yield F.cross_entropy(logits.float(), targets, reduction="sum")
