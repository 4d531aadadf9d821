"""Text to token ids and back, whatever file the vocabulary comes in.

`Tokenizer` is the one class; `load_tokenizer` finds out what a path holds. tokenizer.json, SentencePiece
models and GGUF vocabularies all become a pipeline of the `tokenizers` library.
"""

from tenfold.tokenizer.bpe import END_OF_TEXT, SMALLEST_VOCAB, check_vocab_size, train_bpe
from tenfold.tokenizer.gguf import tokenizer_from_gguf
from tenfold.tokenizer.loading import load_tokenizer
from tenfold.tokenizer.tokenizer import TextStream, Tokenizer

__all__ = [
    "END_OF_TEXT",
    "SMALLEST_VOCAB",
    "TextStream",
    "Tokenizer",
    "check_vocab_size",
    "load_tokenizer",
    "tokenizer_from_gguf",
    "train_bpe",
]
