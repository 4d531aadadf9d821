"""Optimizers and the learning-rate schedule."""

from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

from tenfold.model.transformer import Transformer
from tenfold.train.muon import StackedMuon
from tenfold.train.settings import TrainSettings


def build_optimizers(model: Transformer, settings: TrainSettings) -> list[Optimizer]:
    """Muon for the matrices and expert stacks, fused AdamW for embeddings, head, norms and routers.

    With `optimizer` "adamw", AdamW for all, with weight decay on the same matrices.
    """
    lr, decay = settings.learning_rate, settings.weight_decay
    matrices, stacks, rest = split_parameters(model)
    if settings.optimizer == "adamw":
        groups = [{"params": matrices + stacks, "weight_decay": decay}, {"params": rest}]
        return [_adamw(groups, lr)]
    optimizers: list[Optimizer] = [_adamw([{"params": rest}], lr)]
    optimizers.append(Muon(matrices, lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    if stacks:
        optimizers.append(StackedMuon(stacks, lr, weight_decay=decay))
    return optimizers


def _adamw(groups: list[dict[str, object]], lr: float) -> AdamW:
    return AdamW(groups, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def split_parameters(model: Transformer) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Hidden matrices, stacks of them (one an expert), and everything else."""
    matrices, stacks, rest = [], [], []
    for name, parameter in model.named_parameters():
        hidden = not any(part in name for part in ("embed_tokens", "lm_head", "router"))
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


def set_learning_rate(optimizers: list[Optimizer], rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
