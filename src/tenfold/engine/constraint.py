"""Text that must match a JSON schema, a regular expression or a grammar: which tokens may come next.

llguidance does the parsing. Constraints come from clients, and each is tried in another process first, within
limits of time and memory (`constraint_worker.py`).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tenfold.engine.request import Constraint
from tenfold.errors import TenfoldError
from tenfold.tokenizer import Tokenizer
from tenfold.tokenizer.sentencepiece import piece_bytes
from tenfold.worker import Worker, WorkerEnded

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MOST_BYTES = 32 << 10
CPU_SECONDS = 1
MEMORY_MEGABYTES = 128

_worker = Worker(Path(__file__).with_name("constraint_worker.py"), CPU_SECONDS, MEMORY_MEGABYTES)


@dataclass(frozen=True)
class _Vocabulary:
    """What llguidance must know of a vocabulary."""

    tokens: "LLTokenizer"
    size: int
    """Of the model's, which may have rows for more than there are tokens."""
    starts_V: NDArray[np.bool_]
    """Tokens that may come first. A tokenizer that drops the first space of a text must not begin with one:
    what is read would not be what was matched."""


class Matcher:
    """Follows one text along a constraint."""

    def __init__(self, matcher: "LLMatcher", vocabulary: _Vocabulary, ends: Sequence[int]) -> None:
        """`ends` are the tokens that end a text. llguidance has its own, of all requests the same."""
        self._matcher, self._vocabulary, self._ends = matcher, vocabulary, list(ends)
        self._begun = False

    def copy(self) -> "Matcher":
        """For another text, from where this one is."""
        copied = Matcher(self._matcher.deep_copy(), self._vocabulary, self._ends)
        copied._begun = self._begun
        return copied

    @property
    def complete(self) -> bool:
        """Whether the text may end here."""
        return self._matcher.is_accepting()

    @property
    def done(self) -> bool:
        """Whether it must: only tokens that end a text may follow, of which there may be none."""
        return self._matcher.is_stopped()

    def mask(self) -> NDArray[np.bool_]:
        """(V,): the tokens that may come next; those that end a text only where it is complete.

        Raises TenfoldError where there is none, or the limits do not allow to find out.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        tokens = self._vocabulary.tokens
        allowed_V = np.unpackbits(bits, bitorder="little").view(bool)[: self._vocabulary.size]
        allowed_V[[end for end in tokens.eos_tokens if end < len(allowed_V)]] = False
        if not self._begun:
            allowed_V &= self._vocabulary.starts_V
        allowed_V[self._ends] = self.complete
        if not (self.done or allowed_V.any()):
            raise TenfoldError("the constraint cannot be followed: no token of the model's may come next")
        return allowed_V

    def advance(self, token: int) -> None:
        """Raises TenfoldError for a token that was not allowed, and where the limits end it."""
        self._begun = True
        if token not in self._ends:
            self._matcher.consume_token(token)
            self._check()

    def _check(self) -> None:
        from tenfold.engine.constraint_worker import problem

        if error := problem(self._matcher):
            raise TenfoldError(f"the constraint cannot be followed: {error:.500}")


def compile_constraint(
    constraint: Constraint, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]
) -> Matcher:
    """A matcher at the beginning of a text. `vocab_size` is the model's. From any thread.

    Raises TenfoldError for what is no such constraint, for what nothing can match, and for what takes more
    than `CPU_SECONDS` or `MEMORY_MEGABYTES`.
    """
    from tenfold.engine.constraint_worker import new_matcher

    kind, text = constraint.kind, constraint.text
    if (size := len(text.encode(errors="replace"))) > MOST_BYTES:
        raise TenfoldError(f"{kind}: it has {size} bytes; {MOST_BYTES} at most are taken")
    try:
        error = json.loads(_worker.ask(json.dumps([kind, text]).encode()))
    except WorkerEnded as ended:
        limit = f"{CPU_SECONDS} s" if ended.out_of_time else f"{MEMORY_MEGABYTES} MB, or is nested too deeply"
        error = f"it takes more than {limit} to prepare: give a simpler one"
    if error:
        raise TenfoldError(f"{kind}: {error:.500}")
    vocabulary = _vocabulary(tokenizer, vocab_size)
    matcher = Matcher(new_matcher(vocabulary.tokens, kind, text), vocabulary, eos_token_ids)
    matcher.mask()
    return matcher


@lru_cache(maxsize=2)
def _vocabulary(tokenizer: Tokenizer, vocab_size: int) -> _Vocabulary:
    """Takes a second. llguidance wants a token for the end: where there is none, it takes the last."""
    from llguidance import LLTokenizer

    rows = max(vocab_size, tokenizer.vocab_size)
    source: Any = tokenizer.raw.to_str() if tokenizer.model_file is None else _Pieces(tokenizer, rows)
    ends = list(tokenizer.eos_token_ids) or [tokenizer.vocab_size - 1]
    try:
        tokens = LLTokenizer(source, n_vocab=rows, eos_token=ends)
    except ValueError as error:
        raise TenfoldError(f"text from this tokenizer cannot be constrained: {error}") from None
    if isinstance(source, _Pieces):
        source.found = tokens
    spaced = [token for token in range(vocab_size) if tokens.decode_bytes([token]).startswith(b" ")]
    starts_V = np.ones(vocab_size, bool)
    if _drops_first_space(tokenizer, tokens, spaced):
        starts_V[spaced] = False
    return _Vocabulary(tokens, vocab_size, starts_V)


def _drops_first_space(tokenizer: Tokenizer, tokens: "LLTokenizer", spaced: Sequence[int]) -> bool:
    one = (token for token in reversed(spaced) if not tokens.decode_bytes([token]).startswith(b"  "))
    token = next(one, None)
    return token is not None and not tokenizer.decode([token]).startswith(" ")


class _Pieces:
    """A SentencePiece vocabulary, by the names that llguidance reads."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    found: "LLTokenizer"
    """What was made of it."""

    def __init__(self, tokenizer: Tokenizer, rows: int) -> None:
        found = piece_bytes(tokenizer)
        added = tokenizer.raw.get_added_tokens_decoder()
        self.tokens = [found.get(token, b"") for token in range(rows)]
        self.special_token_ids = [token for token, entry in added.items() if entry.special]
        self.eos_token_id = rows - 1

    def __call__(self, text: str) -> list[int]:
        """How text that must come is cut: not as the model is used to, for that depends on what is before."""
        return self.found.greedy_tokenize(text)
