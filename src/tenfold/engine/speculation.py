"""Guessing tokens ahead, so that one step may make several: how, and whether it is worth it."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

DRAFTS = 4
"""Tokens that a sequence guesses ahead."""
NGRAM = 3
MEMORY = 0.1
"""The newest step's share of an estimate."""
FIRST_PROBE, LAST_PROBE = 16, 512
"""Steps until the way that seemed slower is tried again: twice as many each time that it is slower still."""


class LookUp:
    """Guesses that a text goes on as it did where its last few tokens were before (Saxena 2023, "Prompt
    lookup decoding"). It reads `ids` as they grow."""

    def __init__(self, ids: Sequence[int]):
        self._ids = ids
        self._next: dict[tuple[int, ...], int] = {}
        self._seen = NGRAM

    def drafts(self, most: int) -> Sequence[int]:
        if not most:
            return []
        for end in range(self._seen, len(self._ids)):
            self._next[tuple(self._ids[end - NGRAM : end])] = end
        self._seen = max(self._seen, len(self._ids))
        at = self._next.get(tuple(self._ids[-NGRAM:]))
        if at is None:
            return []
        turn = self._ids[at : at + most]  # where that is short, the text goes round
        return [turn[n % len(turn)] for n in range(most)]


@dataclass
class _Way:
    """Tokens and seconds of a step, on average."""

    steps: int = 0
    tokens: float = 0.0
    seconds: float = 0.0

    def learn(self, tokens: int, seconds: float) -> None:
        share = max(MEMORY, 1 / (self.steps + 1))
        self.steps += 1
        self.tokens += share * (tokens - self.tokens)
        self.seconds += share * (seconds - self.seconds)

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class _Size:
    """What is known of batches of about one size."""

    plain: _Way = field(default_factory=_Way)
    drafted: _Way = field(default_factory=_Way)
    since: int = 0
    """Steps since the slower way was tried."""
    patience: int = FIRST_PROBE


class Speculation:
    """Drafts where the engine's own clock says that they make more tokens a second."""

    def __init__(self) -> None:
        self._sizes: defaultdict[int, _Size] = defaultdict(_Size)

    def wanted(self, batch: int) -> int:
        """Tokens that each of `batch` sequences may guess ahead in the next step."""
        size = self._sizes[batch.bit_length()]
        pays = size.drafted.speed > size.plain.speed
        probe = size.since >= size.patience
        return DRAFTS if pays != probe or not size.drafted.steps else 0

    def learn(self, batch: int, drafted: bool, tokens: int, seconds: float) -> None:
        """What a step did: all the tokens that came of it, with drafts or without any."""
        size = self._sizes[batch.bit_length()]
        pays = size.drafted.speed > size.plain.speed
        (size.drafted if drafted else size.plain).learn(tokens, seconds)
        size.since += 1
        if drafted != pays:
            still = pays == (size.drafted.speed > size.plain.speed)
            size.patience = min(LAST_PROBE, 2 * size.patience) if still else FIRST_PROBE
            size.since = 0
