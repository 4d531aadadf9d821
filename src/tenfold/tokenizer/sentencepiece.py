"""SentencePiece models: the sentencepiece package inside a pipeline of the `tokenizers` library.

The package cuts text into pieces; the pipeline around it finds special tokens in the text and adds them,
as for any other tokenizer. Converted to the pipeline's own models instead, some text came out otherwise:
equal scores are not decided alike, nor is all Unicode normalised alike.

A model is a protocol buffer:
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import AddedToken, PreTokenizedString, Token, decoders, models, pre_tokenizers

from tenfold.errors import TenfoldError
from tenfold.tokenizer.tokenizer import Tokenizer, mark_special, put_around
from tenfold.tokenizer.tokenizer_config import AddedTokenEntry, TokenizerFiles

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how pieces spell a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces


def sentencepiece_tokenizer(data: bytes, source: str, beside: TokenizerFiles) -> Tokenizer:
    """The tokenizer of a SentencePiece model, of any of its kinds; `data` is what a tokenizer.model holds.

    A model that puts a space before every text puts it where transformers does: at the beginning, and with
    tokenizer_config.json's `legacy` also after each special token. Raises TenfoldError, naming `source`,
    for data that is no such model, and for added tokens that do not fit to it.
    """
    model = _parse(data, source)
    if beside.config.tokenizer_class in ("T5Tokenizer", "T5TokenizerFast"):
        beside = _as_t5(beside, len(model.pieces))
    config = beside.config
    has_space = model.normalizer_spec.add_dummy_prefix and config.add_prefix_space is not False
    drops_spaces = model.normalizer_spec.remove_extra_whitespaces
    raw = tokenizers.Tokenizer(
        models.WordLevel({piece.piece: i for i, piece in enumerate(model.pieces)}, unk_token="")
    )
    first = _processor(model, has_space, source)
    later = first if config.legacy or not has_space else _processor(model, False, source)
    raw.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(_Cutter(first, later))
    raw.decoder = decoders.Decoder.custom(_Joiner(has_space or drops_spaces, drops_spaces))
    _add_tokens(raw, beside.added_tokens, source)
    mark_special(raw, [piece.piece for piece in model.pieces if piece.type in (UNKNOWN, CONTROL)])
    mark_special(raw, beside.more_special)
    special = _roles(model) | beside.special_tokens
    put_around(
        raw,
        special.get("bos_token") if config.add_bos_token else None,
        special.get("eos_token") if config.add_eos_token else None,
    )
    flags = {"add_bos_token", "add_eos_token", "add_prefix_space", "legacy"}
    return Tokenizer(
        raw,
        special,
        ends=beside.ends,
        chat_template=beside.chat_template,
        model_file=data,
        settings={
            "tokenizer_class": config.tokenizer_class or "LlamaTokenizer",
            "added_tokens_decoder": {str(i): token.model_dump() for i, token in beside.added_tokens.items()},
            **config.model_dump(include=flags, exclude_none=True),
        },
    )


class _Cutter:
    """Cuts a text into the model's pieces; special tokens have been found already."""

    def __init__(self, first: "SentencePieceProcessor", later: "SentencePieceProcessor") -> None:
        """`first` is for a stretch that begins the text, `later` for those after a special token."""
        self._first, self._later = first, later

    def pre_tokenize(self, text: PreTokenizedString) -> None:
        stretches = (start for _, (start, _), tokens in text.get_splits() if tokens is None)
        processors = iter([self._later if start else self._first for start in stretches])

        def cut(stretch: str) -> list[Token]:
            processor = next(processors)
            return [Token(i, processor.id_to_piece(i), (0, 0)) for i in processor.encode(stretch)]

        text.tokenize(cut)


class _Joiner:
    """Joins pieces into text as sentencepiece does, with special tokens spelled out."""

    def __init__(self, drop_first_space: bool, drop_all_first_spaces: bool) -> None:
        self._drop_first, self._drop_all = drop_first_space, drop_all_first_spaces

    def decode_chain(self, pieces: Sequence[str]) -> list[str]:
        text, drop = bytearray(), self._drop_first
        for piece in pieces:
            if byte := _BYTE.fullmatch(piece):
                text.append(int(byte[1], 16))
                continue
            if drop and not text and piece.startswith(SPACE):
                piece, drop = piece[1:], self._drop_all
            text += piece.replace(SPACE, " ").encode()
        # Each byte that is not UTF-8 becomes one U+FFFD.
        return [_NOT_UTF8.sub("\N{REPLACEMENT CHARACTER}", text.decode(errors="surrogateescape"))]


_BYTE = re.compile("<0x([0-9A-F]{2})>")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")


def piece_bytes(tokenizer: Tokenizer) -> dict[int, bytes]:
    """By token: what `_Joiner` makes of a piece that is not the first."""
    return {
        token: bytes([int(byte[1], 16)])
        if (byte := _BYTE.fullmatch(piece))
        else piece.replace(SPACE, " ").encode()
        for piece, token in tokenizer.raw.get_vocab().items()
    }


def new_model() -> Any:
    """An empty model, as the protocol buffer that files hold."""
    from sentencepiece import sentencepiece_model_pb2 as protocol

    return protocol.ModelProto()  # type: ignore[attr-defined]  # made at run time


def _parse(data: bytes, source: str) -> Any:
    from google.protobuf.message import DecodeError

    model = new_model()
    try:
        model.ParseFromString(data)
    except DecodeError:
        model.Clear()
    if not model.pieces:
        raise TenfoldError(
            f"{source}: not a SentencePiece model (some repositories keep other formats under that name:"
            " take their tokenizer.json)"
        )
    try:
        "".join(piece.piece for piece in model.pieces).encode()
    except (TypeError, UnicodeEncodeError):
        raise TenfoldError(f"{source}: not a whole SentencePiece model: a piece is not UTF-8") from None
    if model.trainer_spec.treat_whitespace_as_suffix or model.denormalizer_spec.precompiled_charsmap:
        raise TenfoldError(f"{source}: models with spaces as suffixes or a denormalizer are not supported")
    return model


def _processor(model: Any, has_space: bool, source: str) -> "SentencePieceProcessor":
    from sentencepiece import SentencePieceProcessor

    model.normalizer_spec.add_dummy_prefix = has_space
    try:
        return SentencePieceProcessor(model_proto=model.SerializeToString())
    except (RuntimeError, ValueError) as error:
        raise TenfoldError(
            f"{source}: not a whole SentencePiece model: {' '.join(str(error).split())}"
        ) from None


def _roles(model: Any) -> dict[str, str]:
    """The special tokens that the model itself names; an id of -1 is none."""
    spec = model.trainer_spec
    ids = {
        "bos_token": spec.bos_id,
        "eos_token": spec.eos_id,
        "unk_token": spec.unk_id,
        "pad_token": spec.pad_id,
    }
    return {role: model.pieces[i].piece for role, i in ids.items() if 0 <= i < len(model.pieces)}


def _as_t5(beside: TokenizerFiles, pieces: int) -> TokenizerFiles:
    """What T5's class knows and its model does not say: sentinels, the first one last, and a last </s>."""
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(beside.config.extra_ids))]
    added = {pieces + i: AddedTokenEntry(content=text, special=True) for i, text in enumerate(sentinels)}
    return replace(
        beside,
        config=beside.config.model_copy(update={"legacy": True, "add_eos_token": True}),
        added_tokens=beside.added_tokens or added,
    )


def _add_tokens(raw: tokenizers.Tokenizer, added: Mapping[int, AddedTokenEntry], source: str) -> None:
    for token, entry in sorted(added.items()):
        raw.add_tokens([AddedToken(**entry.model_dump())])
        if raw.token_to_id(entry.content) != token:
            raise TenfoldError(
                f"{source}: the added token {entry.content} cannot have id {token}: the model has"
                f" {raw.id_to_token(token) or 'too few pieces'} there"
            )
