"""The tokenizer of a model: text to ids and back, its special tokens, its chat template."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import tokenizers
from tokenizers import AddedToken, processors

from tenfold.chat_template import ChatTemplate
from tenfold.errors import TenfoldError


class Tokenizer:
    """A pipeline of the `tokenizers` library (`raw`) and what a model's files say of it.

    `special_tokens` are texts by their role ("bos_token"), as in tokenizer_config.json. Those that the
    vocabulary has become special tokens of `raw`. `eos_token_ids` are all tokens that end a text or a turn:
    the eos_token and `ends`. `model_file` is the SentencePiece model that `raw` runs, if it does, and
    `settings` what tokenizer_config.json must say besides for `save` to lose nothing.
    """

    def __init__(
        self,
        raw: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        *,
        ends: Iterable[int] = (),
        chat_template: ChatTemplate | None = None,
        model_file: bytes | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.raw = raw
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template
        self.model_file = model_file
        self._settings = dict(settings or {})
        mark_special(raw, self.special_tokens.values())
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        self.unk_token_id = self._id_of("unk_token")
        self.pad_token_id = self._id_of("pad_token")
        first = () if self.eos_token_id is None else (self.eos_token_id,)
        self.eos_token_ids = tuple(dict.fromkeys((*first, *ends)))
        # Ids may have gaps, and a model needs a row for the largest.
        self.vocab_size = max(raw.get_vocab().values()) + 1

    def _id_of(self, role: str) -> int | None:
        return self.raw.token_to_id(self.special_tokens.get(role, ""))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the tokens that the model's files put before or after every text.

        Special tokens that are spelled out in `text` become themselves.
        """
        return self._encode([text], add_special_tokens)[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of many texts at once, on all cores, with nothing before or after: for training."""
        return self._encode(texts, add_special_tokens=False)

    def _encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        try:
            encodings = self.raw.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError):
            raise TenfoldError(
                "the text is not valid Unicode (it has a lone surrogate); give UTF-8 text"
            ) from None
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`, special tokens spelled out or skipped; what is not UTF-8 becomes U+FFFD."""
        return str(self.raw.decode(ids, skip_special_tokens=skip_special_tokens))

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = ...,
        add_generation_prompt: bool = ...,
        tokenize: Literal[True] = ...,
        **variables: Any,
    ) -> list[int]: ...

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = ...,
        add_generation_prompt: bool = ...,
        *,
        tokenize: Literal[False],
        **variables: Any,
    ) -> str: ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        **variables: Any,
    ) -> list[int] | str:
        """A conversation as the model was trained to see it: ids, or with `tokenize=False` text.

        `add_generation_prompt` ends it where the model's answer begins. `tools` are JSON schemas;
        `variables` are what this model's template knows besides. Raises TenfoldError if there is no
        template or it fails (see `ChatTemplate.render`).
        """
        if self.chat_template is None:
            raise TenfoldError("this tokenizer has no chat template: encode the text itself")
        text = self.chat_template.render(
            messages,
            tools,
            **{**self.special_tokens, **variables, "add_generation_prompt": add_generation_prompt},
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def files(self, **settings: Any) -> dict[str, bytes]:
        """The files, by name, of which `load_tokenizer` and transformers make the same tokenizer.

        `settings` are further fields of tokenizer_config.json.
        """
        config = {"clean_up_tokenization_spaces": False, **self._settings, **self.special_tokens, **settings}
        if self.chat_template is not None:
            templates = self.chat_template.templates
            config["chat_template"] = [{"name": n, "template": t} for n, t in templates.items()]
        files = {"tokenizer_config.json": _json(config)}
        if self.model_file is None:
            files["tokenizer.json"] = self.raw.to_str(pretty=True).encode()
        else:
            files["tokenizer.model"] = self.model_file
        if len(self.eos_token_ids) > 1:
            files["generation_config.json"] = _json({"eos_token_id": self.eos_token_ids})
        return files

    def save(self, directory: Path, **settings: Any) -> None:
        """Write `files` into a directory that is there."""
        for name, content in self.files(**settings).items():
            (directory / name).write_bytes(content)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def mark_special(raw: tokenizers.Tokenizer, texts: Iterable[str]) -> None:
    """Make those of `texts` that the vocabulary has special: found whole in text, skipped when asked to."""
    known = {token.content for token in raw.get_added_tokens_decoder().values() if token.special}
    new = [t for t in dict.fromkeys(texts) if t not in known and raw.token_to_id(t) is not None]
    raw.add_special_tokens([AddedToken(text, normalized=False) for text in new])


def put_around(raw: tokenizers.Tokenizer, before: str | None, after: str | None) -> None:
    """Let `raw` put these special tokens around every text, where they are given and in its vocabulary."""
    tokens = {"before": before, "after": after}
    found = {place: raw.token_to_id(text) for place, text in tokens.items() if text is not None}
    ids = {place: token for place, token in found.items() if token is not None}
    raw.post_processor = processors.TemplateProcessing(
        single=[piece for piece in ("before", "$A", "after") if piece == "$A" or piece in ids],
        special_tokens=[
            {"id": place, "ids": [token], "tokens": [tokens[place]]} for place, token in ids.items()
        ],
    )


class TextStream:
    """The text of tokens as they come, never half a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # A token's text depends on what is before it (a first space is dropped), so it is read beside
        # the tokens of the last piece: what is new is what they do not say alone.
        self._before: list[int] = []
        self._new: list[int] = []

    def step(self, token: int) -> str:
        """The text that `token` completes, often empty while a character has more bytes to come."""
        self._new.append(token)
        together = [*self._before, *self._new]
        text = self._tokenizer.decode(together)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        piece = text[len(self._tokenizer.decode(self._before)) :]
        self._before = self._new if self._tokenizer.decode(self._new) else together
        self._new = []
        return piece
