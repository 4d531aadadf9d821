"""Finding out what a path holds, and loading it."""

from pathlib import Path

import tokenizers

from tenfold.errors import TenfoldError
from tenfold.hub import resolve
from tenfold.tokenizer.bpe import END_OF_TEXT
from tenfold.tokenizer.gguf import tokenizer_from_gguf
from tenfold.tokenizer.sentencepiece import sentencepiece_tokenizer
from tenfold.tokenizer.tokenizer import Tokenizer, mark_special
from tenfold.tokenizer.tokenizer_config import TokenizerFiles, read_tokenizer_files

NAMES = ("tokenizer.json", "tokenizer.model", "spiece.model")


def tokenizer_file(path: Path) -> Path:
    """`path` itself, or the first of NAMES in that folder; TenfoldError if there is none."""
    if not path.is_dir():
        found = [path] if path.is_file() else []
    else:
        found = [path / name for name in NAMES if (path / name).is_file()]
    if not found:
        missing = path / NAMES[0] if path.is_dir() else path
        raise TenfoldError(
            f"{missing}: no such file; give a tokenizer.json, a tokenizer.model (SentencePiece), a .gguf"
            " file or the folder one of the first two is in"
        )
    return found[0]


def load_tokenizer(path_or_id: str | Path) -> Tokenizer:
    """The tokenizer of a model's folder or hub id, a tokenizer.json, a SentencePiece model or a .gguf file.

    Special tokens, the chat template and the tokens that end a text are what the files beside it say
    (tokenizer_config.json and its kin), or the GGUF's keys. Where no eos_token is named it is
    `<|endoftext|>`, if the vocabulary has that. Raises TenfoldError naming the file that is missing or
    corrupt.
    """
    file = tokenizer_file(resolve(path_or_id, "tokenizer"))
    if file.suffix == ".gguf":
        from tenfold.checkpoint.gguf.reader import open_gguf

        return tokenizer_from_gguf(open_gguf(file).metadata, str(file))
    beside = read_tokenizer_files(file.parent)
    if ".model" in file.suffixes:
        return sentencepiece_tokenizer(file.read_bytes(), str(file), beside)
    return _from_json(file, beside)


def _from_json(file: Path, beside: TokenizerFiles) -> Tokenizer:
    """A tokenizer.json: its own post-processor says what `encode` adds, whatever the config's flags say."""
    try:
        raw = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        reason = " ".join(str(error).split())
        raise TenfoldError(f"{file}: not a Hugging Face tokenizer.json: {reason}") from None
    if not raw.get_vocab_size():
        raise TenfoldError(f"{file}: its vocabulary is empty")
    raw.no_truncation()  # a file may ask for both, which would lose or add tokens
    raw.no_padding()
    mark_special(raw, beside.more_special)
    special = dict(beside.special_tokens)
    if "eos_token" not in special and raw.token_to_id(END_OF_TEXT) is not None:
        special["eos_token"] = END_OF_TEXT
    eos = special.get("eos_token")
    if eos is not None and raw.token_to_id(eos) is None:
        raise TenfoldError(
            f"{file.with_name('tokenizer_config.json')}: eos_token {eos} is not in {file.name}'s vocabulary"
        )
    return Tokenizer(
        raw,
        special,
        ends=beside.ends,
        chat_template=beside.chat_template,
        settings={"tokenizer_class": "PreTrainedTokenizerFast"},
    )
