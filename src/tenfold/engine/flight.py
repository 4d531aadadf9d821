"""A pass through the model that is under way: who is in it, what it has cost, and what comes of it."""

import time
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tenfold.engine.batch import BatchRunner, Chunk, Outcome, Pass
from tenfold.engine.blocks import Table
from tenfold.engine.expert_store import ExpertStore
from tenfold.engine.reading import Reading
from tenfold.engine.request import Costs
from tenfold.engine.sequence import Experts, Seq
from tenfold.packed import PackedModel


class Weights(NamedTuple):
    """What of a model's weights a pass reads."""

    always: int = 0
    """Bytes that any pass does."""
    record: int = 0
    """Bytes of an expert."""
    store: ExpertStore | None = None

    @classmethod
    def of(cls, runner: BatchRunner) -> "Weights":
        model = getattr(runner, "model", None)
        if isinstance(model, PackedModel):
            reading = Reading.of(model.config, model.weights, 1)
            used = len(model.config.sparse_layers) * model.config.num_experts_per_tok
            routed = reading.bytes_per_step - reading.always_bytes
            return cls(reading.always_bytes, routed // used if used else 0, model.store)
        if model is None:
            return cls()
        config, size = model.config, model.embed_tokens.weight.element_size()
        record = size * (config.expert_params + config.expert_biases)
        always = size * config.num_params() - record * config.num_experts * len(config.sparse_layers)
        return cls(always, record)


class Member(NamedTuple):
    seq: Seq
    chunk: Chunk
    table: Table
    """Of its blocks, which the pass writes even if the sequence has left it."""
    costs: Costs

    @property
    def stays(self) -> bool:
        return self.seq.table is self.table


class Landed(NamedTuple):
    member: Member
    logits_NV: Tensor
    experts: Sequence[Experts] | None
    """Of each wanted token, if its request asks for them."""


class Flight:
    """Chunks on their way. It is settled once: when it has landed, or is given up."""

    def __init__(self, runner: BatchRunner, weights: Weights, chunks: Sequence[tuple[Seq, Chunk]]):
        self._weights, self._sparse = weights, runner.config.sparse_layers
        self._config = runner.config
        self.members = [
            Member(seq, chunk, seq.table, seq.costs) for seq, chunk in chunks if seq.table is not None
        ]
        self.tokens = sum(len(chunk.ids) for _, chunk in chunks)
        self.spent = Costs(tokens=self.tokens)
        self.debt = 0.0
        """Seconds that others were let past it, which it may have now."""
        self._layers = 0
        self._runner = runner
        self._pass: Pass | None = None

    @property
    def empty(self) -> bool:
        return not any(member.stays for member in self.members)

    def has(self, seq: Seq) -> bool:
        return any(member.seq is seq and member.stays for member in self.members)

    def advance(self, layers: int | None = None) -> bool:
        """As `Pass.advance`."""
        with _Clock(self.spent, self._weights.store):
            if self._pass is None:
                self._pass = self._runner.begin([member.chunk for member in self.members])
            done = self._pass.advance(layers)
            if done:
                self._logits_NV = self._pass.logits().cpu()
        self._layers = self._config.num_hidden_layers if layers is None else self._layers + layers
        return done

    def advance_for(self, seconds: float) -> bool:
        """As many layers as that is enough for, going by those before, but one at least."""
        each = self.spent.seconds / self._layers if self._layers else seconds
        return self.advance(max(1, int(seconds / each)) if each else None)

    def land(self) -> Iterator[Landed]:
        """Once it is done."""
        end = 0
        for member, experts in zip(self.members, self._experts(), strict=True):
            start, end = end, end + member.chunk.wanted
            yield Landed(member, self._logits_NV[start:end], experts)

    def draft(self, asking: Collection[Seq]) -> dict[Seq, int]:
        """Once it has landed, before its sequences go on: how these do, as the model guesses."""
        assert self._pass is not None
        outcomes = [
            Outcome(seq.cached - chunk.start, seq.ids[seq.cached], seq in asking)
            if member.stays
            else Outcome(0, 0, False)
            for member in self.members
            for seq, chunk in [(member.seq, member.chunk)]
        ]
        guesses = zip(self.members, self._pass.draft(outcomes), strict=True)
        return {member.seq: guess for member, guess in guesses if guess is not None}

    def _experts(self) -> Iterator[Sequence[Experts] | None]:
        for member, by_layer in zip(self.members, self._routes(), strict=True):
            wanted = member.chunk.wanted
            if wanted and member.seq.job.request.routes:
                yield [[routes[row - wanted].tolist() for routes in by_layer] for row in range(wanted)]
            else:
                yield None

    def _routes(self) -> Iterator[list[NDArray[np.int32]]]:
        """Of each member, what the sparse layers chose so far: (T, K), or (wanted, K) of the last of all."""
        every = [routes_TK.numpy(force=True) for routes_TK in (self._pass.routes if self._pass else ())]
        to_last = self._sparse[len(every) - 1 :] == [self._config.num_hidden_layers - 1]
        last = len(every) - 1 if to_last else None
        start = first = 0
        for _, chunk, *_ in self.members:
            stop, end = start + len(chunk.ids), first + chunk.wanted
            yield [routes[first:end] if n == last else routes[start:stop] for n, routes in enumerate(every)]
            start, first = stop, end

    def settle(self) -> Costs:
        """Split what was spent among the tokens, and note which experts each request used. All together."""
        spent, weights = self.spent, self._weights
        distinct = self._note_experts()
        if weights.store is None:
            spent.hits = distinct
        spent.weight_bytes = weights.always + (spent.hits + spent.misses) * weights.record
        for seq, chunk, _, costs in self.members:
            share = len(chunk.ids) / self.tokens
            costs.tokens += min(len(chunk.ids), len(seq.ids) - chunk.start)  # without drafts
            for name in ("weight_bytes", "disk_bytes", "hits", "misses", "seconds", "wait_seconds"):
                setattr(costs, name, getattr(costs, name) + share * getattr(spent, name))
        return spent

    def _note_experts(self) -> int:
        """Different (layer, expert) pairs of all its tokens."""
        every: set[int] = set()
        for member, by_layer in zip(self.members, self._routes(), strict=True):
            numbered = [
                np.where(routes < 0, -1, routes + n * self._config.num_experts).ravel()
                for n, routes in enumerate(by_layer)
            ]
            used = set(np.concatenate(numbered).tolist()) - {-1} if numbered else set()
            every |= used
            job = member.seq.job
            job.experts_used |= used
            job.meter.distinct_experts = len(job.experts_used)
        return len(every)


class _Clock:
    """Adds what happens inside to some costs: several passes take turns, and each pays for its own."""

    def __init__(self, costs: Costs, store: ExpertStore | None):
        self._costs, self._store = costs, store

    def __enter__(self) -> None:
        self._before = self._store and self._store.meter()
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        costs = self._costs
        costs.seconds += time.perf_counter() - self._start
        if self._store and self._before:
            after, before = self._store.meter(), self._before
            costs.hits += after.hits - before.hits
            costs.misses += after.misses - before.misses
            costs.disk_bytes += after.bytes_read - before.bytes_read
            costs.wait_seconds += after.wait_seconds - before.wait_seconds
