"""The text of tokens as they come: cut at a stop string, and nothing shown that one may take back."""

from collections.abc import Collection

from tenfold.sampling import SamplingParams
from tenfold.tokenizer import TextStream, Tokenizer


def end_tokens(tokenizer: Tokenizer, model_ends: Collection[int], params: SamplingParams) -> frozenset[int]:
    """Tokens that end a text, and are no part of it."""
    own = () if params.ignore_eos else (*model_ends, *tokenizer.eos_token_ids)
    return frozenset((*own, *params.stop_token_ids))


class StoppedText:
    """`add` tokens until it is `stopped`, or `finish` it before."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams):
        self._tokenizer, self._stops = tokenizer, params.stop
        self._stream = TextStream(tokenizer)
        self._whole = ""
        self.tokens: list[int] = []
        self.text = ""
        """What was shown."""
        self.stopped = False

    def add(self, token: int) -> str:
        """What is new and will stay."""
        self.tokens.append(token)
        before = len(self._whole)
        self._whole += self._stream.step(token)
        if (cut := self._stop_at(before)) is not None:
            self.stopped = True
            return self._show(self._whole[:cut])
        return self._show(self._whole[: len(self._whole) - self._begun_stop()])

    def finish(self) -> str:
        """What was held back, where no stop string came: half a character too."""
        return "" if self.stopped else self._show(self._tokenizer.decode(self.tokens))

    def _stop_at(self, before: int) -> int | None:
        found = [
            at for stop in self._stops if (at := self._whole.find(stop, max(0, before - len(stop) + 1))) >= 0
        ]
        return min(found, default=None)

    def _begun_stop(self) -> int:
        """How many last characters may be the beginning of a stop string."""
        return max(map(self._begun, self._stops), default=0)

    def _begun(self, stop: str) -> int:
        at = max(0, len(self._whole) - len(stop) + 1)
        # Few texts have many places where it may begin, so this looks at these alone.
        while (at := self._whole.find(stop[0], at)) >= 0 and not stop.startswith(self._whole[at:]):
            at += 1
        return len(self._whole) - at if at >= 0 else 0

    def _show(self, text: str) -> str:
        shown = len(self.text)
        if len(text) > shown:
            self.text = text
        return text[shown:]
