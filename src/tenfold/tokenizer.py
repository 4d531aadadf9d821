"""Text to token ids and back: training a byte-level BPE, and loading any tokenizer.json."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tenfold.errors import TenfoldError
from tenfold.hub import resolve

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCAB = 257  # every byte, and the end of a text


class Tokenizer:
    """A tokenizer.json with the few things that training and generation ask of it."""

    def __init__(self, raw: tokenizers.Tokenizer, eos_token_id: int | None) -> None:
        self.raw = raw
        self.eos_token_id = eos_token_id
        # Ids may have gaps, and a model needs a row for the largest.
        self.vocab_size = max(raw.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` alone: nothing is put before or after it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` for many texts at once, on all cores."""
        try:
            encodings = self.raw.encode_batch_fast(texts, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):
            raise TenfoldError(
                "the text is not valid Unicode (it has a lone surrogate); give UTF-8 text"
            ) from None
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        return str(self.raw.decode(ids, skip_special_tokens=False))


def check_vocab_size(vocab_size: int) -> None:
    """Raises TenfoldError if a byte-level vocabulary cannot be that small."""
    if vocab_size < SMALLEST_VOCAB:
        raise TenfoldError(
            f"vocab_size {vocab_size} is too small: a byte-level vocabulary needs at least"
            f" {SMALLEST_VOCAB} (256 bytes and {END_OF_TEXT})"
        )


def train_bpe(texts: Iterator[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, fewer if the text has no more pairs to join.

    `<|endoftext|>` is token 0, and any text survives encoding and decoding unchanged.
    """
    check_vocab_size(vocab_size)
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer=trainer)
    return raw


def tokenizer_file(path: Path) -> Path:
    """`path` itself, or the tokenizer.json in that folder; TenfoldError if there is none."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise TenfoldError(f"{file}: no such file; give a tokenizer.json or the folder it is in")
    return file


def load_tokenizer(path_or_id: str | Path) -> Tokenizer:
    """Load a tokenizer.json, or the one in a folder or of a hub id.

    The token that ends a text is the eos_token of the tokenizer_config.json beside it, else
    `<|endoftext|>`, else none. Raises TenfoldError naming the file that is missing or corrupt.
    """
    file = tokenizer_file(resolve(path_or_id, "tokenizer"))
    try:
        raw = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        reason = " ".join(str(error).split())
        raise TenfoldError(f"{file}: not a Hugging Face tokenizer.json: {reason}") from None
    if not raw.get_vocab_size():
        raise TenfoldError(f"{file}: its vocabulary is empty")
    raw.no_truncation()  # a file may ask for both, which would lose or add tokens
    raw.no_padding()
    config = file.with_name("tokenizer_config.json")
    eos_token = _configured_eos(config) if config.is_file() else None
    eos_token_id = raw.token_to_id(eos_token or END_OF_TEXT)
    if eos_token and eos_token_id is None:
        raise TenfoldError(f"{config}: eos_token {eos_token} is not in {file.name}'s vocabulary")
    return Tokenizer(raw, eos_token_id)


def _configured_eos(config: Path) -> str | None:
    """tokenizer_config.json's eos_token: a string, a table with its `content`, or absent."""
    try:
        values = json.loads(config.read_bytes())
        eos = values.get("eos_token")
        if isinstance(eos, dict):
            eos = eos["content"]
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise TenfoldError(f"{config}: not a tokenizer_config.json: {error}") from None
    if eos is not None and not isinstance(eos, str):
        raise TenfoldError(f"{config}: eos_token must be a string, not {eos!r}")
    return eos
