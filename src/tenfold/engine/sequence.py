"""A request under way (`Job`), and each of its texts (`Seq`), as the scheduler sees them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tenfold.engine.batch import Chunk, Pending
from tenfold.engine.blocks import Table
from tenfold.engine.constraint import Matcher
from tenfold.engine.request import Costs, FinishReason, Logprob, Meter, Piece, Request, Token
from tenfold.engine.sampler import Sampler, logprob
from tenfold.engine.speculation import LookUp
from tenfold.engine.text import StoppedText

Experts = Sequence[Sequence[int]]
"""What each sparse layer chose for a token."""


@dataclass(eq=False)
class Job:
    """A request, what it has cost, and which of its texts are not finished."""

    request: Request
    matcher: Matcher | None = None
    """Of its constraint, at the beginning of a text."""
    meter: Meter = field(default_factory=Meter)
    submitted: float = field(default_factory=time.perf_counter)
    unfinished: set[int] = field(default_factory=set)
    experts_used: set[int] = field(default_factory=set)
    """Numbers of (layer, expert) pairs."""

    def __post_init__(self) -> None:
        self.unfinished.update(range(self.request.n))

    @property
    def age(self) -> float:
        """Seconds since it was submitted."""
        return time.perf_counter() - self.submitted


class Seq:
    """One text of a request: waiting while it has no `table`, active while it has one."""

    def __init__(
        self,
        job: Job,
        order: tuple[int, int],
        sampler: Sampler,
        text: StoppedText,
        ends: frozenset[int],
        limit: int,
    ):
        self.job, self.index, self.sampler, self.text, self.ends = job, order[1], sampler, text, ends
        self.order = order
        """By arrival; the lesser goes first."""
        self.limit = limit
        """Tokens to generate at most."""
        self.ids = list(job.request.prompt_ids)
        self.cached = 0
        """How many of `ids` are in the cache."""
        self.table: Table | None = None
        self.look_up = LookUp(self.ids)
        self._states: list[Tensor] = []
        self._drafted = 0
        """Positions that a drafter has seen; `_states` are of those after."""
        self._reset_prompt(self.index == 0 and job.request.prompt_logprobs is not None)

    def _reset_prompt(self, wanted: bool) -> None:
        self.prompt_logprobs: list[Logprob | None] | None = [None] if wanted else None
        """So far; None where they are not wanted, or not any more."""

    @property
    def remaining(self) -> int:
        return len(self.ids) - self.cached

    @property
    def generated(self) -> int:
        return len(self.ids) - len(self.job.request.prompt_ids)

    @property
    def decoding(self) -> bool:
        """Whether all but the last token, which was generated, is in the cache."""
        return self.remaining == 1 and self.generated > 0

    @property
    def costs(self) -> Costs:
        """What its next chunk adds to."""
        return self.job.meter.decode if self.decoding else self.job.meter.prompt

    def begin(self, table: Table, cached: int) -> None:
        """Its cache is there, and holds some of it already."""
        self.table, self.cached = table, cached
        self._states, self._drafted = [], cached

    def begin_again(self) -> None:
        """Its cache is lost."""
        self.table, self.cached = None, 0
        self._reset_prompt(self.prompt_logprobs is not None)

    def chunk(self, tokens: int, drafts: Sequence[int] = ()) -> Chunk:
        """The next `tokens` of its own, and guesses at what follows."""
        assert self.table is not None
        own = self.ids[self.cached : self.cached + tokens]
        wanted = 1 + len(drafts) if tokens == self.remaining else 0
        if self.prompt_logprobs is not None:
            wanted = len(own)
        return Chunk(self.table.blocks, self.cached, [*own, *drafts], wanted)

    @property
    def has_pending(self) -> bool:
        """Not where all but its last token was found in the cache."""
        return bool(self._states)

    def pending(self) -> Pending:
        """What a drafter has to see to guess on; it then has seen it. Only while decoding."""
        assert self.table is not None
        start, self._drafted = self._drafted, self.cached
        states_SD, self._states = torch.cat(self._states), []
        return Pending(self.table.blocks, start, states_SD, self.ids[start + 1 : self.cached + 1])

    def take(
        self,
        chunk: Chunk,
        logits_NV: Tensor,
        experts: Sequence[Experts] | None = None,
        states_SD: Tensor | None = None,
    ) -> Piece | None:
        """What came of a chunk; None where its prompt goes on. `experts` are of each wanted token, states
        of all.

        Drafts change nothing but speed: the sampler draws as it would have without them, one token after
        another, and goes on while it draws what was guessed. Raises what the sampler does.
        """
        if self.prompt_logprobs is not None:
            self._tell_prompt(chunk, logits_NV)
        end = chunk.start + len(chunk.ids)
        drafts = chunk.ids[len(chunk.ids) - max(0, end - len(self.ids)) :] if end > len(self.ids) else ()
        self.cached = end - len(drafts)
        if self.remaining:
            self._keep(chunk, states_SD)
            return None
        first = len(logits_NV) - 1 - len(drafts)
        piece, tokens = Piece(self.index, "", ()), []
        self.job.meter.drafted += len(drafts)
        for row, draft in enumerate([*drafts, None], first):
            token = self.sampler(logits_NV[row])
            if token in self.ends:
                self._finish(piece, "stop")
                break
            asked = self.job.request.logprobs
            told = None if asked is None else logprob(logits_NV[row], token, asked)
            tokens.append(Token(token, told, None if experts is None else experts[row]))
            self._add(token, piece)
            if piece.finish_reason or token != draft:
                break
            self.cached += 1
            self.job.meter.accepted += 1
            self.job.meter.decode.tokens += 1
        piece.tokens, piece.prompt = tokens, self.prompt_logprobs
        self._reset_prompt(False)
        self._keep(chunk, states_SD)
        return piece

    def _keep(self, chunk: Chunk, states_SD: Tensor | None) -> None:
        if states_SD is not None:
            self._states.append(states_SD[: self.cached - chunk.start])

    def _add(self, token: int, piece: Piece) -> None:
        self.ids.append(token)
        piece.text += self.text.add(token)
        if self.text.stopped or self.sampler.done:
            self._finish(piece, "stop")
        elif self.generated >= self.limit:
            self._finish(piece, "length")

    def _finish(self, piece: Piece, reason: FinishReason) -> None:
        piece.text += self.text.finish()
        piece.finish_reason = reason

    def _tell_prompt(self, chunk: Chunk, logits_NV: Tensor) -> None:
        told, top = self.prompt_logprobs, self.job.request.prompt_logprobs
        assert told is not None and top is not None
        predicted = self.job.request.prompt_ids[chunk.start + 1 : chunk.start + 1 + len(chunk.ids)]
        # The prompt's last token predicts the first that is generated.
        told += [logprob(row_V, token, top) for row_V, token in zip(logits_NV, predicted, strict=False)]
