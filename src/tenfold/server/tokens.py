"""Single tokens as clients see them: their bytes, their text, their log-probabilities."""

import re
from codecs import getincrementaldecoder
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from tenfold.engine.request import Logprob, Token
from tenfold.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTexts:
    """A token alone may be part of a character, which only its bytes can say."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._raw = tokenizer.raw
        self._special = {i: t.content for i, t in tokenizer.raw.get_added_tokens_decoder().items()}
        self._letters = _byte_level() if "ByteLevel" in str(tokenizer.raw.decoder) else None
        self.bytes = lru_cache(maxsize=1 << 16)(self._bytes)

    def _bytes(self, token: int) -> bytes:
        if token in self._special:
            return self._special[token].encode()
        text = self._raw.id_to_token(token) or ""
        if self._letters is not None:
            return b"".join(self._letters.get(c) or c.encode() for c in text)
        if found := _BYTE.fullmatch(text):
            return bytes([int(found[1], 16)])
        return text.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    def text(self, token: int) -> str:
        return self.bytes(token).decode(errors="replace")

    def reader(self) -> Callable[[int], str]:
        """Texts of tokens that follow one another: a character of several belongs to the last of them."""
        decoder = getincrementaldecoder("utf-8")("replace")
        return lambda token: decoder.decode(self.bytes(token))


def _byte_level() -> dict[str, bytes]:
    """The letters that GPT-2's tokenisers write bytes as."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): bytes([byte]) for byte in plain}
    return letters | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}


def told_tokens(tokens: Sequence[Token], text_of: Callable[[int], str]) -> dict[str, Any]:
    """What `return_experts` adds to a chunk."""
    told = [{"id": token.id, "text": text_of(token.id), "experts": token.experts} for token in tokens]
    return {"tenfold": {"tokens": told}}


def chat_logprobs(tokens: Sequence[Token], texts: TokenTexts) -> list[dict[str, Any]]:
    """`logprobs.content` of a chat."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": texts.text(token), "logprob": logprob, "bytes": list(texts.bytes(token))}

    return [
        {
            **entry(token.id, token.logprob.logprob),
            "top_logprobs": [entry(*one) for one in token.logprob.top],
        }
        for token in tokens
        if token.logprob
    ]


class CompletionLogprobs:
    """`logprobs` of a completion, of tokens that follow one another."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts, self._read, self._offset = texts, texts.reader(), 0

    def __call__(self, told: Sequence[tuple[int, Logprob | None]]) -> dict[str, list[Any]]:
        """Of each token its id and what is known of it, None of a text's first."""
        tokens = [token for token, _ in told]
        known = [logprob for _, logprob in told]
        return {
            "tokens": [self._texts.text(token) for token in tokens],
            "token_logprobs": [None if one is None else one.logprob for one in known],
            "top_logprobs": [None if one is None else _by_text(one, self._texts) for one in known],
            "text_offset": [self._next(token) for token in tokens],
        }

    def _next(self, token: int) -> int:
        begin = self._offset
        self._offset += len(self._read(token))
        return begin


def _by_text(told: Logprob, texts: TokenTexts) -> dict[str, float]:
    """Of several tokens with one text the likeliest counts."""
    found: dict[str, float] = {}
    for token, logprob in [*told.top, (told.token, told.logprob)]:
        found.setdefault(texts.text(token), logprob)
    return found
