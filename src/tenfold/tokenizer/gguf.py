"""The tokenizer that a GGUF file carries in its metadata.

Keys are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md ("tokenizer.ggml."), and
what they leave open is as llama.cpp takes it.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as shown
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from tenfold.chat_template import ChatTemplate
from tenfold.errors import TenfoldError
from tenfold.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from tenfold.tokenizer.sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    new_model,
    sentencepiece_tokenizer,
)
from tenfold.tokenizer.tokenizer import Tokenizer, put_around
from tenfold.tokenizer.tokenizer_config import TokenizerConfig, TokenizerFiles

ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # spelled so in the format
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
TEMPLATE = "tokenizer.chat_template"


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """The tokenizer of a GGUF's key-values, arrays as lists. `source` names the file in messages.

    `tokenizer.ggml.model` "llama" is SentencePiece's BPE, "gpt2" is byte-level BPE; raises TenfoldError for
    any other, for an unknown `tokenizer.ggml.pre`, and for arrays that are missing, wrong or contradictory.
    """
    keys = _Keys(metadata, source)
    kind = keys.text("model")
    if kind == "llama":
        return _sentencepiece(keys)
    if kind == "gpt2":
        return _byte_level(keys)
    raise TenfoldError(f"{source}: tokenizer.ggml.model {shown(kind)} is not supported, only llama and gpt2")


@dataclass(frozen=True)
class _Keys:
    """The tokenizer's key-values, checked as they are read."""

    metadata: Mapping[str, Any]
    source: str

    def get(self, name: str, kind: type | tuple[type, ...], wanted: str) -> Any:
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        if value is not None and not _is(value, kind):
            raise TenfoldError(f"{self.source}: tokenizer.ggml.{name} must be {wanted}, not {shown(value)}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        return str(self._needed(name, self.get(name, str, "text") or default))

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, bool, "true or false")
        return default if value is None else bool(value)

    def array(self, name: str, kind: type | tuple[type, ...], wanted: str) -> list[Any]:
        values: list[Any] = self._needed(name, self.get(name, list, f"an array of {wanted}"))
        for value in values:
            if not _is(value, kind):
                raise TenfoldError(f"{self.source}: tokenizer.ggml.{name} holds {shown(value)}, not {wanted}")
        return values

    def _needed(self, name: str, value: Any) -> Any:
        if value is None:
            raise TenfoldError(f"{self.source}: tokenizer.ggml.{name} is missing")
        return value

    def tokens(self) -> list[str]:
        tokens = self.array("tokens", str, "texts")
        if not tokens:
            raise TenfoldError(f"{self.source}: tokenizer.ggml.tokens is empty")
        try:
            "".join(tokens).encode()
        except UnicodeEncodeError:
            raise TenfoldError(f"{self.source}: tokenizer.ggml.tokens holds what is not UTF-8") from None
        token, times = Counter(tokens).most_common(1)[0]
        if times > 1:
            raise TenfoldError(f"{self.source}: tokenizer.ggml.tokens holds {shown(token)} {times} times")
        return tokens

    def types(self, count: int) -> list[int]:
        """One a token, of SentencePiece's; by default all are normal."""
        if self.metadata.get("tokenizer.ggml.token_type") is None:
            return [NORMAL] * count
        types = self.array("token_type", int, "integers")
        self._check_count("token_type", types, count)
        if unknown := set(types) - set(range(NORMAL, BYTE + 1)):
            raise TenfoldError(
                f"{self.source}: tokenizer.ggml.token_type holds {min(unknown)}, not 1 to {BYTE}"
            )
        return types

    def scores(self, count: int) -> list[float]:
        scores = self.array("scores", (float, int), "numbers")
        self._check_count("scores", scores, count)
        if not all(map(math.isfinite, scores)):
            raise TenfoldError(f"{self.source}: tokenizer.ggml.scores holds a value that is not finite")
        return scores

    def _check_count(self, name: str, values: list[Any], count: int) -> None:
        if len(values) != count:
            raise TenfoldError(
                f"{self.source}: tokenizer.ggml.{name} has {len(values)} entries for {count} tokens"
            )

    def token_id(self, name: str, count: int) -> int | None:
        value = self.get(name, int, "a token id")
        if value is not None and not 0 <= value < count:
            raise TenfoldError(f"{self.source}: tokenizer.ggml.{name} {value} is none of its {count} tokens")
        return None if value is None else int(value)

    def roles(self, tokens: list[str]) -> dict[str, str]:
        ids = {role: self.token_id(name, len(tokens)) for role, name in ROLES.items()}
        return {role: tokens[token] for role, token in ids.items() if token is not None}

    def ends(self, count: int) -> tuple[int, ...]:
        ids = [self.token_id(name, count) for name in ENDS]
        return tuple(token for token in ids if token is not None)

    def chat_template(self) -> ChatTemplate | None:
        templates = {
            name.removeprefix(TEMPLATE).removeprefix(".") or "default": value
            for name, value in self.metadata.items()
            if (name == TEMPLATE or name.startswith(TEMPLATE + ".")) and isinstance(value, str)
        }
        return ChatTemplate(templates, self.source) if templates else None


def _is(value: object, kind: type | tuple[type, ...]) -> bool:
    """As isinstance, but a bool is no number."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _byte_level(keys: _Keys) -> Tokenizer:
    tokens, name = keys.tokens(), keys.text("pre", "default")
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise TenfoldError(f"{keys.source}: tokenizer.ggml.pre {shown(name)} is not known, only {known}")
    pre = PRE_TOKENIZERS[name]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [_pair(merge, keys.source) for merge in keys.array("merges", str, "texts")]
    try:
        raw = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.ignore_merges))
    except Exception as error:  # the library raises nothing narrower
        raise TenfoldError(f"{keys.source}: tokenizer.ggml.merges: {' '.join(str(error).split())}") from None
    if pre.nfc:
        raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer, raw.decoder = pre.build(), decoders.ByteLevel()
    types = keys.types(len(tokens))
    raw.add_tokens(
        [
            AddedToken(token, normalized=False, special=type_ == CONTROL)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ in (CONTROL, USER_DEFINED)
        ]
    )
    special = keys.roles(tokens)
    put_around(
        raw,
        special.get("bos_token") if keys.flag("add_bos_token", pre.add_bos) else None,
        special.get("eos_token") if keys.flag("add_eos_token", False) else None,
    )
    return Tokenizer(
        raw,
        special,
        ends=keys.ends(len(tokens)),
        chat_template=keys.chat_template(),
        settings={"tokenizer_class": "PreTrainedTokenizerFast"},
    )


def _pair(merge: str, source: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right:
        raise TenfoldError(f"{source}: tokenizer.ggml.merges holds {shown(merge)}, not two tokens")
    return left, right


def _sentencepiece(keys: _Keys) -> Tokenizer:
    """The model is put together again and run by SentencePiece itself."""
    tokens = keys.tokens()
    scores, types = keys.scores(len(tokens)), keys.types(len(tokens))
    unknown = keys.token_id("unknown_token_id", len(tokens)) or 0
    types = [UNKNOWN if i == unknown else type_ for i, type_ in enumerate(types)]
    model = new_model()
    for token, score, type_ in zip(tokens, scores, types, strict=True):
        # A file may spell runs of spaces that are tokens of their own with real spaces.
        piece = token.replace(" ", SPACE) if type_ == USER_DEFINED else token
        model.pieces.add(piece=piece, score=score, type=type_)
    spec = model.trainer_spec
    spec.model_type = spec.BPE
    spec.byte_fallback = BYTE in types
    spec.bos_id, spec.eos_id, spec.pad_id = -1, -1, -1
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = keys.flag("remove_extra_whitespaces", False)
    config = TokenizerConfig(
        add_bos_token=keys.flag("add_bos_token", True),
        add_eos_token=keys.flag("add_eos_token", False),
        add_prefix_space=keys.flag("add_space_prefix", True),
        legacy=True,  # llama.cpp puts a space after special tokens too
    )
    beside = TokenizerFiles(
        config=config,
        special_tokens=keys.roles(tokens),
        more_special=(),
        added_tokens={},
        ends=keys.ends(len(tokens)),
        chat_template=keys.chat_template(),
    )
    return sentencepiece_tokenizer(model.SerializeToString(), keys.source, beside)
