"""What the routers did in a step, for each sparse layer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tenfold.model.router import RouterAux


class RoutingMeter:
    """Gathers loads, entropies and drops over the micro-batches of one step."""

    def __init__(self) -> None:
        self.loads: list[Tensor] = []
        self.entropy: list[Tensor] = []
        self.dropped: list[Tensor] = []
        self.batches = 0

    @torch.no_grad()
    def observe(self, layers: Sequence[RouterAux]) -> None:
        loads = [aux.load_E for aux in layers]
        entropy = [torch.special.entr(aux.probs_TE).sum(-1).mean() for aux in layers]
        dropped = [aux.dropped for aux in layers]
        if self.batches:
            loads, entropy, dropped = (
                [a + b for a, b in zip(old, new, strict=True)]
                for old, new in (
                    (self.loads, loads),
                    (self.entropy, entropy),
                    (self.dropped, dropped),
                )
            )
        self.loads, self.entropy, self.dropped = loads, entropy, dropped
        self.batches += 1

    def summary(self) -> dict[str, list[float]]:
        """One number a layer: load CV and MaxVio (0 is even), dead experts, entropy (nats), dropped share."""
        loads = [load.double() for load in self.loads]
        return {
            "load_cv": [float(load.std(correction=0) / load.mean()) for load in loads],
            "max_vio": [float(load.max() / load.mean() - 1) for load in loads],
            "dead_experts": [float((load == 0).sum()) for load in loads],
            "router_entropy": [float(entropy) / self.batches for entropy in self.entropy],
            "dropped": [
                float(dropped) / float(load.sum()) for dropped, load in zip(self.dropped, loads, strict=True)
            ],
        }
