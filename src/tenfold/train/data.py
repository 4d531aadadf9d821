"""From documents to batches: hold some out, tokenise once, keep it, and serve windows of it.

What is kept is a folder `<cache>/<key>` of raw token files (train.bin, valid.bin), the tokenizer
and meta.json. The key covers the documents' contents, in the order they are read, and the tokenizer.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tenfold.config import ModelConfig
from tenfold.errors import TenfoldError
from tenfold.tokenizer import END_OF_TEXT, Tokenizer, check_vocab_size, load_tokenizer, train_bpe
from tenfold.train.split import Split, split_texts, survey
from tenfold.train.tokenise import end_of_text, write_tokens

FORMAT = 1
BPE_BYTES = 32_000_000  # merges settle long before this much text

Tokens = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, eq=False)
class TokenData:
    """A tokenised corpus on disk."""

    folder: Path
    key: str
    vocab_size: int
    eos_token_id: int
    valid_bytes: int  # of UTF-8, in the held-out text
    tokenizer: Tokenizer
    train: Tokens
    valid: Tokens

    def bits_per_byte(self, nats_sum: float, tokens: int) -> float:
        """Bits to encode a byte of held-out text, from the summed loss of `tokens` of its tokens.

        Unlike nats per token it does not depend on the tokenizer. Exact when every validation token
        is scored; of a part, or without the very first token, it takes the rest to cost the mean.
        """
        return nats_sum / tokens / math.log(2) * len(self.valid) / self.valid_bytes

    def validation_batches(self, seq_len: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs_BS, targets_BS), int64: each validation token but the first is a target once.

        The last window may be shorter, and then is a batch of one row.
        """
        _check_sizes(seq_len=seq_len, batch_size=batch_size)
        full = (len(self.valid) - 1) // seq_len
        for first in range(0, full, batch_size):
            rows = np.arange(first, min(first + batch_size, full))
            yield _windows(self.valid, rows, seq_len)
        rest = (len(self.valid) - 1) % seq_len
        if rest:
            yield _shifted(self.valid[None, -rest - 1 :])


class TrainOrder:
    """The order in which training windows are seen: a function of the text, seq_len and seed only.

    Window i holds seq_len inputs from token i * seq_len on, and each epoch permutes the windows.
    """

    def __init__(self, tokens: Tokens, seq_len: int, seed: int) -> None:
        _check_sizes(seq_len=seq_len)
        if seed < 0:
            raise TenfoldError(f"seed must be 0 or more, not {seed}")
        if len(tokens) < seq_len + 1:
            raise TenfoldError(
                f"the training text has {len(tokens)} tokens and one window of seq_len {seq_len}"
                f" needs {seq_len + 1}: give more text or a smaller seq_len"
            )
        self.tokens = tokens
        self.seq_len = seq_len
        self.seed = seed
        self.windows = (len(tokens) - 1) // seq_len

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """(inputs_BS, targets_BS), int64, of the sequences numbered first to first + count - 1."""
        numbers = range(first, first + count)
        rows = [self._window(number) for number in numbers]
        return _windows(self.tokens, np.array(rows), self.seq_len)

    def _window(self, number: int) -> int:
        epoch, place = divmod(number, self.windows)
        return int(_permutation(self.windows, self.seed, epoch)[place])


@lru_cache(maxsize=4)
def _permutation(windows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(windows)


def _windows(tokens: Tokens, rows: npt.NDArray[np.int64], seq_len: int) -> tuple[Tensor, Tensor]:
    return _shifted(tokens[rows[:, None] * seq_len + np.arange(seq_len + 1)])


def _shifted(windows: Tokens) -> tuple[Tensor, Tensor]:
    tokens_BS = torch.from_numpy(windows.astype(np.int64))
    return tokens_BS[:, :-1].contiguous(), tokens_BS[:, 1:].contiguous()


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise TenfoldError(f"{name} must be at least 1, not {size}")


def prepare(
    sources: Sequence[str],
    tokenizer_path: Path | None,
    vocab_size: int,
    cache_dir: Path | None = None,
) -> TokenData:
    """Tokenise `sources`, or find them tokenised in the cache.

    A BPE of `vocab_size` is trained on the training part unless `tokenizer_path` is given.
    `cache_dir` is $TENFOLD_CACHE or ~/.cache/tenfold by default. Raises TenfoldError for sources
    that cannot be read or are too short, and for a cache that cannot be written.
    """
    if tokenizer_path is None:
        check_vocab_size(vocab_size)
        tokenizer, identity = None, f"bpe {vocab_size}".encode()
    else:
        tokenizer = load_tokenizer(tokenizer_path)
        identity = b"%s %d" % (_digest(tokenizer), end_of_text(tokenizer, tokenizer_path))
    split = survey(sources)
    key = hashlib.sha256(b"%d %s " % (FORMAT, identity) + b"".join(split.sizes)).hexdigest()
    cache = cache_dir or _default_cache()
    folder = cache / key
    if not folder.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            # Built elsewhere and renamed: what has the name is whole, whoever else is building it.
            with tempfile.TemporaryDirectory(dir=cache, prefix=".new-") as unfinished:
                build = Path(unfinished) / key
                build.mkdir()
                _build(build, sources, split, tokenizer, vocab_size)
                _publish(build, folder)
        except OSError as error:
            raise TenfoldError(
                f"{cache}: the token cache cannot be written ({error.strerror or error});"
                " set TENFOLD_CACHE to a folder that can"
            ) from None
    return _open(folder)


def _build(
    folder: Path,
    sources: Sequence[str],
    split: Split,
    tokenizer: Tokenizer | None,
    vocab_size: int,
) -> None:
    if tokenizer is None:
        texts = _first_bytes(text for held, text in split_texts(sources, split) if not held)
        tokenizer = Tokenizer(train_bpe(texts, vocab_size), {"eos_token": END_OF_TEXT})
    tokenizer.save(folder)
    meta = write_tokens(folder, sources, split, tokenizer)
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _first_bytes(texts: Iterator[str]) -> Iterator[str]:
    left = BPE_BYTES
    for text in texts:
        yield text[:left]
        left -= len(text.encode())
        if left <= 0:
            return


def _digest(tokenizer: Tokenizer) -> bytes:
    """A hash of all that decides the ids."""
    return hashlib.sha256(b"".join(tokenizer.files().values())).hexdigest().encode()


def _default_cache() -> Path:
    if chosen := os.environ.get("TENFOLD_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tenfold"


def _publish(build: Path, folder: Path) -> None:
    try:
        build.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first, with the same content
            raise


def _open(folder: Path) -> TokenData:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        arrays = {
            part: np.memmap(
                folder / f"{part}.bin",
                np.dtype(meta["dtype"]),
                "r",
                shape=(meta[f"{part}_tokens"],),
            )
            for part in ("train", "valid")
        }
        return TokenData(
            folder=folder,
            key=folder.name,
            vocab_size=meta["vocab_size"],
            eos_token_id=meta["eos_token_id"],
            valid_bytes=meta["valid_bytes"],
            tokenizer=load_tokenizer(folder),
            **arrays,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TenfoldError(f"{folder}: damaged token cache ({error}); delete that folder") from None


def with_tokenizer(config: ModelConfig, data: TokenData, init: str | None = None) -> ModelConfig:
    """The config with the vocabulary and the end-of-text token that the data really has.

    That of the model `init` stays as it is: its vocabulary must hold the tokenizer's.
    """
    if init is not None:
        if data.vocab_size > config.vocab_size:
            raise TenfoldError(
                f"the tokenizer has {data.vocab_size} tokens, more than the vocab_size"
                f" {config.vocab_size} of {init}"
            )
        return config
    changes = {"vocab_size": data.vocab_size, "eos_token_id": data.eos_token_id}
    return ModelConfig.parse(config.model_dump() | changes, "model")
