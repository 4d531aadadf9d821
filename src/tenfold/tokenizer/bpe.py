"""Training a byte-level BPE."""

from collections.abc import Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tenfold.errors import TenfoldError

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCAB = 257  # every byte, and the end of a text


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
