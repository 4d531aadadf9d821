"""Text that must match a JSON schema, a regular expression or a grammar: which tokens may come next.

llguidance does the parsing. What it is given is hostile.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tenfold.engine.request import Constraint
from tenfold.errors import TenfoldError
from tenfold.tokenizer import Tokenizer
from tenfold.tokenizer.sentencepiece import piece_bytes

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class Matcher:
    """Follows one text along a constraint."""

    def __init__(self, matcher: "LLMatcher", vocab_size: int, never: int | None) -> None:
        """`never` is a token that llguidance takes for the end of a text, and the model does not."""
        self._matcher, self._vocab_size, self._never = matcher, vocab_size, never

    def copy(self) -> "Matcher":
        """For another text of the same request, from where this one is."""
        return Matcher(self._matcher.deep_copy(), self._vocab_size, self._never)

    @property
    def complete(self) -> bool:
        """Whether the text may end here."""
        return self._matcher.is_accepting()

    @property
    def done(self) -> bool:
        """Whether it must."""
        return self._matcher.is_stopped()

    def mask(self) -> Tensor:
        """bool (V,): the tokens that may come next; those that end a text only where it is complete.

        Raises TenfoldError where there are none: the constraint cannot be met, or not within the limits.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(bool)
        if self._never is not None:
            allowed[self._never] = False
        if not (allowed.any() or self.done):
            raise TenfoldError("no token can go on with the text that the constraint asks for")
        return torch.from_numpy(allowed)

    def advance(self, token: int) -> None:
        """Raises TenfoldError for a token that was not allowed."""
        if not self.done:
            self._matcher.consume_token(token)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error() or (self.done and not self.complete):
            reason = self._matcher.get_error().split("\n", 1)[0] or "no text can match it"
            raise TenfoldError(reason)


def compile_constraint(
    constraint: Constraint, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]
) -> Matcher:
    """A matcher at the beginning of a text. `vocab_size` is the model's.

    Raises TenfoldError for what is no such constraint, what nothing can match, and what would take too long.
    """
    from llguidance import LLMatcher, LLParserLimits

    grammars: dict[str, Callable[[str], str]] = {
        "json_schema": LLMatcher.grammar_from_json_schema,
        "regex": LLMatcher.grammar_from_regex,
        "grammar": LLMatcher.grammar_from_lark,
    }
    vocabulary = _vocabulary(tokenizer, vocab_size, tuple(eos_token_ids))
    limits = LLParserLimits(verbose_errors=False)
    try:
        matcher = LLMatcher(
            vocabulary, grammars[constraint.kind](constraint.text), log_level=0, limits=limits
        )
        found = Matcher(matcher, vocab_size, None if eos_token_ids else vocabulary.eos_token)
        found.mask()
    except (ValueError, TenfoldError) as error:
        raise TenfoldError(f"{constraint.kind}: {error}") from None
    return found


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]) -> "LLTokenizer":
    """What llguidance makes of a vocabulary, which takes it a second.

    It wants an end: of a model that has none, the last token is taken for one.
    """
    from llguidance import LLTokenizer

    rows = max(vocab_size, tokenizer.vocab_size)
    source: Any = tokenizer.raw.to_str() if tokenizer.model_file is None else _Pieces(tokenizer, rows)
    try:
        return LLTokenizer(source, n_vocab=rows, eos_token=list(eos_token_ids) or [tokenizer.vocab_size - 1])
    except ValueError as error:
        raise TenfoldError(f"text from this tokenizer cannot be constrained: {error}") from None


class _Pieces:
    """A SentencePiece vocabulary, by the names that llguidance reads."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, rows: int) -> None:
        found = piece_bytes(tokenizer)
        added = tokenizer.raw.get_added_tokens_decoder()
        self.tokens = [found.get(token, b"") for token in range(rows)]
        self.special_token_ids = [token for token, entry in added.items() if entry.special]
        self.eos_token_id = rows - 1

    def __call__(self, text: str) -> list[int]:  # noqa: ARG002
        """Asked which tokens are usual for text that must come: not known, it depends on what is before."""
        return []
