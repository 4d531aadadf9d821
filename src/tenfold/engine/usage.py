"""What tokens cost, measured while they are made: weights used, bytes from disk, and where the time went."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tenfold.engine.expert_store import ExpertStore
from tenfold.engine.reading import Reading
from tenfold.memory import Plan, peak_memory_bytes, size
from tenfold.model.switch import SwitchTransformer
from tenfold.model.transformer import Transformer
from tenfold.packed import PackedModel


@dataclass
class Spent:
    """By some tokens together. Experts are counted once for each step that reads them, in each layer."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    hits: int = 0
    misses: int = 0
    ahead: int = 0
    """Hits that were read shortly before, because they seemed to be wanted next."""
    bytes_read: int = 0
    wait_seconds: float = 0.0


class Usage:
    """Of one generation: `prompt`, and `decode` for the tokens after it."""

    def __init__(self, model: Transformer | PackedModel | SwitchTransformer, batch: int = 1):
        self.prompt, self.decode = Spent(), Spent()
        self.plan: Plan | None = None
        self._batch = batch
        self._store: ExpertStore | None = None
        self._record_bytes = 0
        self._reading: Reading | None = None
        if isinstance(model, PackedModel):
            self.plan, self._store = model.plan, model.store
            self._record_bytes = self._store.record_bytes if self._store else 0
            self._reading = Reading.of(model.config, model.weights, batch)

    @contextmanager
    def step(self, spent: Spent, tokens: int) -> Iterator[None]:
        """Around one step of the model, which adds to `prompt` or to `decode`."""
        before, start = self._store and self._store.meter(), time.perf_counter()
        yield
        spent.seconds += time.perf_counter() - start
        spent.tokens, spent.steps = spent.tokens + tokens, spent.steps + 1
        if self._store and before:
            after = self._store.meter()
            spent.hits += after.hits - before.hits
            spent.misses += after.misses - before.misses
            spent.ahead += after.prefetched_in_time - before.prefetched_in_time
            spent.bytes_read += after.bytes_read - before.bytes_read
            spent.wait_seconds += after.wait_seconds - before.wait_seconds

    def summary(self) -> dict[str, Any]:
        """What `--json` prints; the names are stable. None is what nobody counted."""
        return {
            "prompt": self.costs(self.prompt),
            "decode": self.costs(self.decode),
            "memory": self.plan.summary() if self.plan else None,
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def costs(self, spent: Spent) -> dict[str, float | None]:
        """Of a token, on average."""
        per = 1 / spent.tokens if spent.tokens else 0.0
        looked_up = spent.hits + spent.misses
        weights = self._weight_bytes(spent)
        return {
            "tokens": spent.tokens,
            "seconds": spent.seconds,
            "tokens_per_second": spent.tokens / spent.seconds if spent.seconds else None,
            "weight_bytes_per_token": None if weights is None else weights * per,
            "disk_bytes_per_token": spent.bytes_read * per,
            "missed_bytes_per_token": self._record_bytes * (spent.misses + spent.ahead) * per,
            "hit_rate": spent.hits / looked_up if looked_up else None,
            "disk_wait_seconds_per_token": spent.wait_seconds * per,
            "compute_seconds_per_token": (spent.seconds - spent.wait_seconds) * per,
        }

    def _weight_bytes(self, spent: Spent) -> float | None:
        """Counted by the store; where all experts are resident, expected of steps of one token a sequence,
        which is exact of one sequence, and not known of others."""
        if self._reading is None:
            return None
        if self._store:
            experts = (spent.hits + spent.misses) * self._record_bytes
            return spent.steps * self._reading.always_bytes + experts
        return (
            spent.steps * self._reading.bytes_per_step if spent.tokens == spent.steps * self._batch else None
        )

    def line(self) -> str | None:
        """For people: what a token cost; None where nothing was counted."""
        costs = self.costs(self.decode if self.decode.steps else self.prompt)
        return _line(costs) if self._reading and costs["tokens_per_second"] else None


def _line(costs: dict[str, float | None]) -> str:
    parts = []
    if (weights := costs["weight_bytes_per_token"]) is not None:
        parts.append(f"weights {size(round(weights))}")
    if (hit_rate := costs["hit_rate"]) is not None:
        parts.append(
            f"from disk {size(round(costs['disk_bytes_per_token'] or 0))} ({hit_rate:.0%} were held)"
        )
        parts.append(f"{1e3 * (costs['disk_wait_seconds_per_token'] or 0):.1f} ms waiting for it")
    parts.append(f"{1e3 * (costs['compute_seconds_per_token'] or 0):.1f} ms computing")
    return f"{costs['tokens_per_second']:.3g} tokens/s; a token: {', '.join(parts)}"
