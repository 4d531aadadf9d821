"""Optimizers and the learning-rate schedule."""

from typing import Any

from torch.nn import Parameter
from torch.optim import AdamW, Muon, Optimizer

from tenfold.model.transformer import Transformer
from tenfold.train.muon import StackedMuon
from tenfold.train.settings import TrainSettings

ADAMW_SHARE = 0.5
"""AdamW's learning rate beside Muon's."""
_NOT_HIDDEN = ("embed_tokens", "lm_head", "router", "shared_expert_gate", "bias")


def build_optimizers(model: Transformer, settings: TrainSettings) -> list[Optimizer]:
    """Muon for the matrices and expert stacks, fused AdamW for embeddings, head, norms and routers.

    Muon's own scaling of the step is kept, rather than the one that matches AdamW's RMS: the latter
    takes steps that are too long for wide layers, and would handicap the equal-total twin (LOG.md).
    With `optimizer` "adamw", AdamW for all, with weight decay on the same matrices.
    """
    optimizers = _build(*split_parameters(model), settings)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]  # under the name torch's own schedulers keep it
    return optimizers


def _build(
    matrices: list[Parameter], stacks: list[Parameter], rest: list[Parameter], settings: TrainSettings
) -> list[Optimizer]:
    lr, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "adamw":
        return [_adamw([{"params": matrices + stacks, "weight_decay": decay}, {"params": rest}], lr)]
    optimizers: list[Optimizer] = [_adamw([{"params": rest}], lr * ADAMW_SHARE)]
    optimizers.append(Muon(matrices, lr, weight_decay=decay))
    if stacks:
        optimizers.append(StackedMuon(stacks, lr, weight_decay=decay))
    return optimizers


def _adamw(groups: list[dict[str, Any]], lr: float) -> AdamW:
    return AdamW(groups, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def split_parameters(model: Transformer) -> tuple[list[Parameter], list[Parameter], list[Parameter]]:
    """Hidden matrices, stacks of them (one an expert), and everything else that learns."""
    matrices, stacks, rest = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        hidden = not any(part in name for part in _NOT_HIDDEN)
        if parameter.ndim == 3:
            stacks.append(parameter)
        elif parameter.ndim == 2 and hidden:
            matrices.append(parameter)
        else:
            rest.append(parameter)
    return matrices, stacks, rest


def schedule(step: int, settings: TrainSettings) -> float:
    """Warm-up, stable, linear decay to zero (WSD): the factor on the learning rate of a step from 0."""
    steps = settings.steps
    warm = min(1.0, (step + 1) / max(1.0, settings.warmup * steps))
    left = steps - step
    return min(warm, left / max(1.0, settings.decay * steps))


def set_learning_rate(optimizers: list[Optimizer], factor: float) -> None:
    """Set every group to its peak times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
