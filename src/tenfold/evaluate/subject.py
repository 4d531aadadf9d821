"""The model that is evaluated."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

from tenfold.checkpoint import load_config
from tenfold.engine.llm import LLM
from tenfold.engine.loading import USUAL_CONTEXT
from tenfold.errors import TenfoldError
from tenfold.evaluate.scoring import SCRATCH_BYTES, Scorer, Text
from tenfold.hub import resolve
from tenfold.memory import Budget
from tenfold.switch_config import decoder_only
from tenfold.tokenizer import load_tokenizer


class Subject:
    """A model on disk, and its tokenizer.

    Weights are loaded when they are first needed, so that a memory budget counts what was there before:
    tasks, texts, and the libraries that read them. Raises TenfoldError for a model that is none, has no
    tokenizer or cannot be evaluated, and for a `context` that it does not have.
    """

    def __init__(self, name: str, context: int | None, batch_size: int, memory: Budget) -> None:
        self.name, self._batch_size, self._memory = name, batch_size, memory
        self._path = resolve(name)
        config = decoder_only(load_config(self._path), name)
        config.check_generates()
        most = config.max_position_embeddings
        if context is not None and context > most:
            raise TenfoldError(f"--context {context} is more than the model's max_position_embeddings {most}")
        self.context = context or min(most, USUAL_CONTEXT)
        self.tokenizer = load_tokenizer(self._path)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        first = eos if bos is None else bos
        if first is None:
            raise TenfoldError(
                f"{name}: a text's first token cannot be predicted, for the tokenizer has neither a bos_token"
                " nor an eos_token"
            )
        self.first_token = first
        """What comes before every text."""

    def windows(self, ids: Sequence[int], stride: int) -> Iterator[Text]:
        """Windows over a text in which each of its tokens is predicted once.

        The first predicts `context` tokens, from those before them and `first_token`. Each later one predicts
        the next `stride` tokens, so that at least `context` - `stride` are before each of them; the last too
        has a whole context.
        """
        whole, end = [self.first_token, *ids], 0
        while end < len(ids):
            begin, end = end, min(end + (stride if end else self.context), len(ids))
            yield Text(whole[max(0, end - self.context) : end], whole[begin + 1 : end + 1])

    @cached_property
    def llm(self) -> LLM:
        memory = replace(self._memory, reserve=self._memory.reserve + SCRATCH_BYTES)
        return LLM(self._path, memory, self.context, self._batch_size)

    @cached_property
    def scorer(self) -> Scorer:
        return Scorer(self.llm.runner, self.llm.blocks, self.context)
