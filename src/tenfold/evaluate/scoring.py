"""How likely a model finds given tokens: many texts at once, each in as few passes as there is room for."""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from tenfold.device import one_torch_thread
from tenfold.engine.batch import BatchRunner, Chunk
from tenfold.engine.blocks import Blocks, Table
from tenfold.engine.packed_batch import PackedBatchRunner
from tenfold.errors import TenfoldError

LOGITS_BYTES = 64 << 20
"""Of a pass, at most: a pass predicts fewer tokens where the vocabulary is large."""
SCRATCH_BYTES = 3 * LOGITS_BYTES // 2
"""That scoring takes besides what the runner does."""
ROWS = 16
"""Whose distributions are worked out at once, which bounds the memory that takes."""


class Text(NamedTuple):
    ids: Sequence[int]
    """What the model reads."""
    targets: Sequence[int]
    """The tokens that come after each of its last len(targets)."""


class Score(NamedTuple):
    logprob: float
    """Of the targets together, in nats."""
    greedy: bool
    """Whether each target is the likeliest token in its place."""


class Scorer:
    """A runner that reads texts of up to `context` tokens each: as many at once as its blocks hold."""

    def __init__(self, runner: BatchRunner, blocks: Blocks, context: int) -> None:
        self._runner, self._blocks, self.context = runner, blocks, context
        self._most_logits = max(1, LOGITS_BYTES // (4 * runner.config.vocab_size))

    @property
    def positions(self) -> int:
        """Of all texts together, that the cache holds."""
        return self._blocks.count * self._blocks.size

    def scores(self, texts: Iterable[Text]) -> Iterator[Score]:
        """Of each text, in their order. Texts are taken as they are needed. Neighbours with the same `ids`
        are read once, and a beginning that was read lately is not read again.

        Raises TenfoldError for a text that is longer than `context`, and where logits are NaN or infinite.
        """
        groups = groupby(texts, key=lambda text: text.ids)
        waiting = (_Reading(ids, [text.targets for text in same]) for ids, same in groups)
        following = next(waiting, None)
        running: list[_Reading] = []
        begun: deque[_Reading] = deque()
        while following or running:
            while following and self._admit(following, running):
                begun.append(following)
                following = next(waiting, None)
            self._step(running)
            running = [reading for reading in running if reading.left]
            while begun and not begun[0].left:
                yield from begun.popleft().scores()

    def _admit(self, reading: "_Reading", running: "list[_Reading]") -> bool:
        """Add a text to those that run, if these leave it room in the next pass and in the cache."""
        if (length := len(reading.ids)) > self.context:
            raise TenfoldError(f"a text of {length:,} tokens is longer than the context of {self.context:,}")
        if sum(other.left for other in running) >= self._runner.max_tokens:
            return False
        opened = self._blocks.open(reading.ids[: reading.first + 1], reuse=True)
        if opened is None:
            return False
        reading.table, reading.done = opened
        if not self._blocks.grow(reading.table, length):
            self._blocks.close(reading.table)
            return False
        running.append(reading)
        return True

    def _step(self, running: "list[_Reading]") -> None:
        """One pass, in which the oldest texts come first."""
        tokens, logits = self._runner.max_tokens, self._most_logits
        chunks = []
        for reading in running:
            chunk = reading.next(tokens, logits)
            tokens, logits = tokens - len(chunk.ids), logits - chunk.wanted
            chunks.append((reading, chunk))
        chunks = [(reading, chunk) for reading, chunk in chunks if chunk.ids]
        with one_torch_thread() if isinstance(self._runner, PackedBatchRunner) else nullcontext():
            step = self._runner.begin([chunk for _, chunk in chunks])
            step.advance()
            pieces = step.logits().split([chunk.wanted for _, chunk in chunks])
        for (reading, chunk), logits_NV in zip(chunks, pieces, strict=True):
            reading.take(chunk, logits_NV)
            self._blocks.keep(reading.table, reading.ids, reading.done)
            if not reading.left:
                self._blocks.close(reading.table)


class _Reading:
    """One text on its way, with all that is asked of it."""

    def __init__(self, ids: Sequence[int], asked: Sequence[Sequence[int]]) -> None:
        self.ids, self._asked = ids, asked
        self.first = len(ids) - max(map(len, asked))
        """Position whose prediction is wanted first."""
        self.table = Table()
        self.done = 0
        """Positions that are in the cache."""
        self._logprobs = [0.0] * len(asked)
        self._greedy = [True] * len(asked)

    @property
    def left(self) -> int:
        """Tokens to read."""
        return len(self.ids) - self.done

    def next(self, tokens: int, logits: int) -> Chunk:
        """At most so many tokens, and so many of them that are asked for."""
        first = max(self.done, self.first)
        stop = min(self.done + tokens, first + logits, len(self.ids))
        return Chunk(self.table.blocks, self.done, self.ids[self.done : stop], max(0, stop - first))

    def take(self, chunk: Chunk, logits_NV: Tensor) -> None:
        """What the model made of a chunk; the logits are those it wanted."""
        self.done += len(chunk.ids)
        position = self.done - chunk.wanted
        for piece_NV in logits_NV.split(ROWS):
            logprobs_NV, likeliest_N = piece_NV.log_softmax(-1), piece_NV.argmax(-1)
            for n, targets in enumerate(self._asked):
                before = position - (len(self.ids) - len(targets))
                here = targets[max(0, before) : max(0, before + len(piece_NV))]
                here_N = torch.tensor(here, dtype=torch.long, device=logits_NV.device)
                last = slice(len(piece_NV) - len(here), None)
                found_N = logprobs_NV[last].gather(1, here_N[:, None])
                self._logprobs[n] += found_N.double().sum().item()
                self._greedy[n] &= torch.equal(likeliest_N[last], here_N)
            position += len(piece_NV)

    def scores(self) -> Iterator[Score]:
        if not all(map(math.isfinite, self._logprobs)):
            raise TenfoldError(
                "the model's logits are NaN or infinite: its weights are damaged, or too large"
            )
        return map(Score, self._logprobs, self._greedy)
