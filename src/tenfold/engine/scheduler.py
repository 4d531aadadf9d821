"""Which sequences go through the model next: many at once, and none kept waiting by the others for long."""

import time
from bisect import insort
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from itertools import count

import torch

from tenfold.device import one_torch_thread
from tenfold.engine.batch import LOGITS_BYTES, BatchRunner, Chunk
from tenfold.engine.blocks import Blocks
from tenfold.engine.constraint import Matcher, compile_constraint
from tenfold.engine.flight import Flight, Weights
from tenfold.engine.request import Constraint, Piece, Request, Stopped, TooLong
from tenfold.engine.sampler import Sampler, check_params
from tenfold.engine.sequence import Job, Seq
from tenfold.engine.speculation import Speculation
from tenfold.engine.text import StoppedText, end_tokens
from tenfold.errors import TenfoldError
from tenfold.packed import PackedModel
from tenfold.tokenizer import Tokenizer

PIECE = 512
"""Tokens of prompts that go through the layers at once. Prompts that are longer are cut at its multiples."""
ALONG = 128
"""Tokens of short prompts, at most, that go with those who decode: the same experts are read for both."""
BREATH = 0.05
"""Seconds for which a prompt goes on, if nobody decodes, before anybody else is heard."""

News = tuple[Job, Piece | TenfoldError]


class Scheduler:
    """Call `step` while it is `busy`; everything from one thread, but for `prepare`.

    A step decodes one token of every sequence that is that far, in one pass, short prompts along with them,
    and then lets one pass of prompts go on for as long as that took. First come, first served, but for
    this: a pass of prompts lets smaller ones past it, and then has as long for itself as they took. Nobody
    waits for ever.

    Where the KV cache is full, the youngest gives way, and is computed anew when there is room. The oldest
    never does, and every sequence fits alone, so that all come to their end.
    """

    def __init__(self, runner: BatchRunner, tokenizer: Tokenizer, context: int, max_sequences: int):
        self._runner, self._tokenizer, self._weights = runner, tokenizer, Weights.of(runner)
        native = isinstance(getattr(runner, "model", None), PackedModel)
        self._threads = one_torch_thread if native else nullcontext
        self.context = min(
            context, runner.config.max_position_embeddings, runner.num_blocks * runner.block_size
        )
        self.max_sequences = min(max_sequences, runner.max_tokens)
        self._piece = min(PIECE, runner.max_tokens)
        self._piece_told = max(1, min(self._piece, LOGITS_BYTES // (4 * runner.config.vocab_size)))
        self._numbers = count()
        self._speculation = Speculation()
        self._news: list[News] = []
        self.blocks = Blocks(runner)
        self.waiting: list[Seq] = []
        self.active: list[Seq] = []
        """Both in order of arrival."""
        self._flights: list[Flight] = []
        """Of prompts. The last one goes on; those before it let it past."""
        self._landed: list[Flight] = []
        """Since the last guesses."""
        self._longest_had_turn = False
        self.steps = self.step_tokens = self.preemptions = 0
        self.hits = self.misses = self.disk_bytes = 0.0

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.active or self._flights)

    def prepare(self, request: Request) -> Job:
        """Check it, from any thread.

        Raises TooLong, and TenfoldError for a prompt without tokens or with ids that are none, and for a
        constraint that cannot be compiled.
        """
        prompt, last = request.prompt_ids, self._runner.config.vocab_size - 1
        if not prompt:
            raise TenfoldError("the prompt is empty: give at least one token of text")
        if len(prompt) >= self.context:
            raise TooLong(f"the prompt has {len(prompt)} tokens; the context holds {self.context}")
        if wrong := next((token for token in prompt if not 0 <= token <= last), None):
            raise TenfoldError(f"token id {wrong} is none of the model's, which are 0 to {last}")
        check_params(request.params, last + 1)
        return Job(request, self._matcher(request))

    def _matcher(self, request: Request) -> Matcher | None:
        if request.constraint is None:
            return None
        config, tokenizer = self._runner.config, self._tokenizer
        ends = sorted(end_tokens(tokenizer, config.eos_token_ids, request.params))
        return _compiled(request.constraint, tokenizer, config.vocab_size, tuple(ends))

    def add(self, job: Job) -> None:
        self.waiting.append(self._seq(job, (next(self._numbers), 0)))

    def _seq(self, job: Job, order: tuple[int, int]) -> Seq:
        request, params = job.request, job.request.params
        return Seq(
            job,
            order,
            Sampler(params, request.prompt_ids, order[1], job.matcher and job.matcher.copy()),
            StoppedText(self._tokenizer, params),
            end_tokens(self._tokenizer, self._runner.config.eos_token_ids, params),
            min(params.max_tokens, self.context - len(request.prompt_ids)),
        )

    def cancel(self, job: Job) -> None:
        """Its texts end as they are; harmless where they have ended."""
        self._drop(job)
        self._news += [(job, Piece(index, "", (), "cancelled")) for index in sorted(job.unfinished)]
        job.unfinished.clear()

    def _fail(self, job: Job, error: TenfoldError) -> None:
        self._drop(job)
        job.unfinished.clear()
        self._news.append((job, error))

    def _drop(self, job: Job) -> None:
        self.waiting = [seq for seq in self.waiting if seq.job is not job]
        for seq in [seq for seq in self.active if seq.job is job]:
            self._release(seq)

    def _release(self, seq: Seq) -> None:
        """Its blocks are free: at once, or when the pass lands that is writing to them for others too."""
        self.active.remove(seq)
        table, flight = seq.table, self._flight_of(seq)
        assert table is not None
        seq.begin_again()
        if flight is None:
            self.blocks.close(table)
        elif flight.empty:
            self._end(flight)

    def _flight_of(self, seq: Seq) -> Flight | None:
        return next((flight for flight in self._flights if flight.has(seq)), None)

    def _end(self, flight: Flight) -> None:
        """Of a pass of prompts: done, or given up. What those who left it had is free."""
        self._flights.remove(flight)
        self._settle(flight)
        for member in flight.members:
            if not member.stays:
                self.blocks.close(member.table)

    def _settle(self, flight: Flight) -> None:
        spent = flight.settle()
        self.hits += spent.hits
        self.misses += spent.misses
        self.disk_bytes += spent.disk_bytes

    @torch.inference_mode()
    def step(self) -> list[News]:
        """One step, and what is new since the last."""
        with self._threads():
            self._admit()
            seconds = self._decode()
            self._prefill(seconds or BREATH)
        news, self._news = self._news, []
        return news

    def _admit(self) -> None:
        while self.waiting and len(self.active) < self.max_sequences:
            seq = self.waiting[0]
            # Each that runs can go on for a block, lest the new one is computed only to give way.
            opened = self.blocks.open(seq.ids, seq.prompt_logprobs is None, spare=len(self.active))
            if opened is None:
                return
            seq.table, seq.cached = opened
            meter = seq.job.meter
            if seq.index == 0 and not seq.generated and not meter.queue_seconds:
                meter.cached_tokens, meter.queue_seconds = seq.cached, seq.job.age
            insort(self.active, self.waiting.pop(0), key=_order)

    # Decoding

    def _decode(self) -> float:
        """One token or more of each that is that far; seconds it took."""
        ready = [
            seq
            for seq in self.active.copy()
            # One before it in the list may have taken its blocks.
            if seq.decoding and self._make_room(seq)
        ]
        start = time.perf_counter()
        guesses = self._guesses(ready)
        if not ready:
            return 0.0
        guessing = time.perf_counter() - start
        chunks = [(seq, seq.chunk(1, self._fitting(seq, guesses[seq]))) for seq in ready]
        room = self._runner.max_tokens - sum(len(chunk.ids) for _, chunk in chunks)
        if prompts := self._together(self._unread(), min(room, ALONG)):
            return self._decode_now([*chunks, *prompts], guessing)[0]
        seconds, tokens = self._decode_now(chunks, guessing)
        drafted = any(len(chunk.ids) > 1 for _, chunk in chunks)
        self._speculation.learn(len(ready), drafted, tokens, seconds)
        return seconds

    def _make_room(self, seq: Seq) -> bool:
        """For the token that it decodes. False where it has to wait, or gave way itself."""
        assert seq.table is not None
        while not self.blocks.grow(seq.table, len(seq.ids)):
            younger = [
                other for other in self.active if other.order > seq.order and self._gives_blocks(other)
            ]
            if younger:
                self._preempt(younger[-1])
            elif self._flights:  # they land, and then their blocks can be had
                return False
            else:
                self._preempt(seq)
                return False
        return True

    def _gives_blocks(self, seq: Seq) -> bool:
        flight = self._flight_of(seq)
        return flight is None or sum(member.stays for member in flight.members) == 1

    def _preempt(self, seq: Seq) -> None:
        self._release(seq)
        insort(self.waiting, seq, key=_order)
        self.preemptions += 1

    def _guesses(self, ready: Sequence[Seq]) -> dict[Seq, Sequence[int]]:
        """How each goes on: as it did before, or else as the model predicts."""
        room = self._runner.max_tokens // max(1, len(ready)) - 1
        most = min(room, self._speculation.wanted(len(ready)))
        found: dict[Seq, Sequence[int]] = {seq: seq.look_up.drafts(most) for seq in ready}
        asking = {seq for seq in ready if most and not found[seq]}
        landed, self._landed = self._landed, []
        for flight in landed:  # also where nobody asks: the model has to see what came of each
            found |= {seq: [guess] for seq, guess in flight.draft(asking).items()}
        return found

    def _fitting(self, seq: Seq, drafts: Sequence[int]) -> Sequence[int]:
        """As many as it may still generate, if there are blocks for them."""
        drafts = drafts[: seq.limit - seq.generated - 1]
        assert seq.table is not None
        return drafts if self.blocks.grow(seq.table, len(seq.ids) + len(drafts)) else ()

    def _decode_now(self, chunks: Sequence[tuple[Seq, Chunk]], guessing: float = 0.0) -> tuple[float, int]:
        """Seconds, those of guessing included, and tokens that came of it."""
        flight = Flight(self._runner, self._weights, chunks)
        flight.spent.seconds += guessing
        try:
            flight.advance()
        except TenfoldError as error:
            self._settle(flight)
            if len(chunks) > 1:  # one of them met the error: alone, the others do not
                done = [self._decode_now([chunk]) for chunk in chunks if chunk[0].table is not None]
                return sum(seconds for seconds, _ in done), sum(tokens for _, tokens in done)
            self._fail(chunks[0][0].job, Stopped(str(error)))
            return 0.0, 0
        self._settle(flight)
        self.steps += 1
        self.step_tokens += len(chunks)
        return flight.spent.seconds, self._land(flight)

    def _land(self, flight: Flight) -> int:
        """Tokens that came of it."""
        tokens = 0
        for member, logits_NV, experts in flight.land():
            seq = member.seq
            if not member.stays:
                continue
            try:
                piece = seq.take(member.chunk, logits_NV, experts)
            except TenfoldError as error:  # logits that are none
                self._fail(seq.job, Stopped(str(error)))
                continue
            self.blocks.keep(member.table, seq.ids, seq.cached)
            if piece is not None:
                tokens += len(piece.tokens)
                self._tell(seq, piece)
        if not flight.empty:
            self._landed.append(flight)
        return tokens

    def _tell(self, seq: Seq, piece: Piece) -> None:
        job = seq.job
        if job.meter.first_token_seconds is None:
            job.meter.first_token_seconds = job.age
            # The prompt is in the cache now: the other texts find it there.
            for index in range(1, job.request.n):
                insort(self.waiting, self._seq(job, (seq.order[0], index)), key=_order)
        if piece.finish_reason is not None:
            job.unfinished.discard(seq.index)
            self._release(seq)
        self._news.append((job, piece))

    # Prompts

    def _prefill(self, seconds: float) -> None:
        """Let a pass of prompts go on for a while."""
        if chunks := self._next_prompts():
            self._begin(chunks)
        if not self._flights:
            return
        flight, before = self._flights[-1], self._flights[-1].spent.seconds
        try:
            if flight.advance_for(seconds):
                self._end(flight)
                self._land(flight)
        except TenfoldError as error:
            self._break(flight, error)
        took = flight.spent.seconds - before
        flight.debt -= took
        for other in self._flights:
            other.debt += took if other is not flight else 0.0

    def _begin(self, chunks: Sequence[tuple[Seq, Chunk]]) -> None:
        self._flights.append(Flight(self._runner, self._weights, chunks))

    def _break(self, flight: Flight, error: TenfoldError) -> None:
        """One of its prompts met the error: alone, the others do not."""
        left = [member for member in flight.members if member.stays]
        self._end(flight)
        if len(left) == 1:
            self._fail(left[0].seq.job, Stopped(str(error)))
        else:
            for member in left:
                self._begin([(member.seq, member.chunk)])

    def _next_prompts(self) -> list[tuple[Seq, Chunk]]:
        """Prompts, or pieces of them, that begin a pass now: where none is under way, or past one that is."""
        ready = self._unread()
        if not ready:
            return []
        if self._flights:
            top = self._flights[-1]
            return self._together(ready, top.tokens // 2) if top.debt <= 0 else []
        whole = self._together(ready, self._piece)
        if whole and (self._longest_had_turn or self._tokens(ready[0]) == ready[0].remaining):
            self._longest_had_turn = False
            return whole
        self._longest_had_turn = True
        size = self._tokens(ready[0])
        return [(ready[0], ready[0].chunk(size)), *self._together(ready[1:], self._piece - size)]

    def _unread(self) -> list[Seq]:
        """Whose prompts are next."""
        return [seq for seq in self.active if not seq.decoding and self._flight_of(seq) is None]

    def _together(self, ready: Sequence[Seq], room: int) -> list[tuple[Seq, Chunk]]:
        """Those that a pass of `room` tokens finishes."""
        chosen = []
        for seq in ready:
            size = self._tokens(seq)
            if size == seq.remaining and size <= room:
                chosen.append((seq, seq.chunk(size)))
                room -= size
        return chosen

    def _tokens(self, seq: Seq) -> int:
        """Of its next chunk."""
        piece = self._piece if seq.prompt_logprobs is None else self._piece_told
        return seq.remaining if seq.remaining <= piece else piece - seq.cached % piece


@lru_cache(maxsize=8)
def _compiled(
    constraint: Constraint, tokenizer: Tokenizer, vocab_size: int, ends: tuple[int, ...]
) -> Matcher:
    """To be copied: the many prompts of a request have one constraint, and clients send the same again."""
    return compile_constraint(constraint, tokenizer, vocab_size, ends)


_order: Callable[[Seq], tuple[int, int]] = lambda seq: seq.order  # noqa: E731
