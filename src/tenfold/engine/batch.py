"""Many sequences of different lengths in one pass through a model: what the scheduler steps.

A pass can stop between two layers and go on later, so that a long prompt never keeps the sequences that
are being decoded waiting for more than a layer's time.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from tenfold.config import ModelConfig
from tenfold.errors import TenfoldError

LOGITS_BYTES = 32 << 20
"""For the logits of all tokens of a prompt, where they are asked for: cuts such prompts shorter."""


class Chunk(NamedTuple):
    """What one sequence brings to a pass."""

    blocks: Sequence[int]
    """Its KV cache: positions [i * block_size, (i + 1) * block_size) are in block `blocks[i]`."""
    start: int
    """Positions that are in the cache already."""
    ids: Sequence[int]
    """Its next tokens, at positions start, start + 1, …"""
    wanted: int
    """Of the last of these, whose logits are wanted: 0 where a prompt goes on in a later pass."""


class Outcome(NamedTuple):
    """What became of a chunk, now that the token after it is known."""

    kept: int
    """Of its tokens, the first that the text has: the rest were wrong guesses. 0 where the text has ended."""
    next_id: int
    """The token after those: chosen, or the prompt's next. Of no use where none is kept."""
    guess: bool
    """Whether a guess is wanted at the token after `next_id`."""


class Pass(Protocol):
    """Chunks on their way through the layers."""

    @property
    def routes(self) -> Sequence[Tensor]:
        """The experts chosen so far: of each sparse layer int32 (T, K), -1 where a slot is empty. Of the last
        layer only (N, K), for the N tokens whose logits are wanted: the others skip its experts."""
        ...

    def advance(self, layers: int | None = None) -> bool:
        """Run the next `layers`, or all that are left. True when all are done."""
        ...

    def logits(self) -> Tensor:
        """(N, V) float32, of the wanted tokens in the order of the chunks. Only once all layers are done."""
        ...

    def draft(self, outcomes: Sequence[Outcome]) -> Sequence[int | None]:
        """Guesses by the model's own multi-token prediction, where they are wanted; None where it has none.

        To be called once, an outcome a chunk, as soon as those are known and even where no guess is wanted:
        what predicts has a cache of its own in the blocks, which this brings up to date.
        """
        ...


class BatchRunner(Protocol):
    """A model, with the blocks of its KV cache."""

    config: ModelConfig
    block_size: int
    """Positions of a block."""
    num_blocks: int
    max_tokens: int
    """Of a pass."""

    def begin(self, chunks: Sequence[Chunk]) -> Pass:
        """A pass. Several may be under way, of different sequences, advanced in any order.

        A sequence's numbers do not depend on what else is in the pass, nor on how its prompt was cut.
        Raises TenfoldError for ids that are no tokens, and for more of them than there is room for.
        """
        ...

    def clear(self, blocks: Sequence[int]) -> None:
        """Blocks that a new sequence will use: what is left in them must not be NaN."""
        ...


def check(chunks: Sequence[Chunk], runner: BatchRunner) -> None:
    """What `begin` raises, before anything is computed or written."""
    tokens = sum(len(chunk.ids) for chunk in chunks)
    if not chunks or not all(chunk.ids for chunk in chunks):
        raise TenfoldError("a pass needs chunks, and each of them 1 token or more")
    if tokens > runner.max_tokens:
        raise TenfoldError(f"{tokens} tokens are more than the {runner.max_tokens} of a pass")
    for chunk in chunks:
        least, most, last = min(chunk.ids), max(chunk.ids), runner.config.vocab_size - 1
        if least < 0 or most > last:
            wrong = least if least < 0 else most
            raise TenfoldError(f"token id {wrong} is none of the model's, which are 0 to {last}")
        if not 0 <= chunk.wanted <= len(chunk.ids):
            raise TenfoldError(f"{chunk.wanted} of {len(chunk.ids)} tokens cannot be wanted")
        length, room = chunk.start + len(chunk.ids), len(chunk.blocks) * runner.block_size
        if length > room:
            raise TenfoldError(f"{length} positions are more than the {room} there is room for")
