"""Generating text with a model: prefill the prompt, then decode token by token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tenfold.checkpoint import load_model
from tenfold.engine.kv_cache import new_kv_cache
from tenfold.engine.sampler import Sampler
from tenfold.errors import TenfoldError
from tenfold.model.transformer import Transformer
from tenfold.sampling import SamplingParams
from tenfold.tokenizer import Tokenizer, load_tokenizer


@torch.inference_mode()
def generate_tokens(model: Transformer, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[int]:
    """Tokens after the prompt, until the end-of-text token (not yielded) or `max_tokens`.

    Raises TenfoldError for an empty prompt, for one that leaves no room in the context, and for
    a model that cannot generate.
    """
    config = model.config
    room = config.max_position_embeddings - len(prompt_ids)
    if not prompt_ids:
        raise TenfoldError("the prompt is empty: give at least one token of text")
    if room < 1:
        raise TenfoldError(
            f"the prompt has {len(prompt_ids)} tokens; the model's context"
            f" (max_position_embeddings) holds {config.max_position_embeddings}"
        )
    wanted = min(params.max_tokens, room)
    weight = model.embed_tokens.weight
    cache = new_kv_cache(config, 1, len(prompt_ids) + wanted, weight.dtype, weight.device)
    sampler = Sampler(params)
    step = torch.tensor([list(prompt_ids)], device=weight.device)
    position = 0
    for _ in range(wanted):
        token = sampler(model(step, cache, position)[0, -1])
        if token == config.eos_token_id:
            return
        yield token
        position += step.shape[1]
        step = torch.tensor([[token]], device=weight.device)


@dataclass
class Generation:
    """Text as it is generated: iterate for the pieces; afterwards `text`, `tokens`, `finish_reason`."""

    model: Transformer
    tokenizer: Tokenizer
    prompt: str
    params: SamplingParams
    text: str = ""
    finish_reason: str = "length"

    def __post_init__(self) -> None:
        self.prompt_ids = self.tokenizer.encode(self.prompt)
        if not self.prompt_ids and self.tokenizer.eos_token_id is not None:
            # A text begins where the one before it ended: that is how the model was trained.
            self.prompt_ids = [self.tokenizer.eos_token_id]
        self.tokens: list[int] = []

    def __iter__(self) -> Iterator[str]:
        """Pieces of text that no later token can change and no stop string will take back."""
        for token in generate_tokens(self.model, self.prompt_ids, self.params):
            self.tokens.append(token)
            whole = self.tokenizer.decode(self.tokens)
            cut = min((at for s in self.params.stop if (at := whole.find(s)) >= 0), default=-1)
            if cut >= 0:
                self.finish_reason = "stop"
                yield from self._advance(whole[:cut])
                return
            yield from self._advance(whole[: len(whole) - self._unsure(whole)])
        if len(self.tokens) < self.params.max_tokens:
            self.finish_reason = "stop"
        yield from self._advance(self.tokenizer.decode(self.tokens))

    def finish(self) -> "Generation":
        """Generate to the end without showing it."""
        for _ in self:
            pass
        return self

    def summary(self) -> dict[str, Any]:
        """What `generate --json` prints; the names are stable."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "prompt_tokens": len(self.prompt_ids),
            "finish_reason": self.finish_reason,
        }

    def _advance(self, text: str) -> Iterator[str]:
        if len(text) > len(self.text):
            piece, self.text = text[len(self.text) :], text
            yield piece

    def _unsure(self, whole: str) -> int:
        """How many last characters may still change: a part of a character, or of a stop string."""
        broken = len(whole) - len(whole.rstrip("\N{REPLACEMENT CHARACTER}"))
        starts = (
            size
            for stop in self.params.stop
            for size in range(1, min(len(stop), len(whole) + 1))
            if whole.endswith(stop[:size])
        )
        return max(broken, max(starts, default=0))


def load_generation(directory: Path, prompt: str, params: SamplingParams) -> Generation:
    """A generation with the model and tokenizer of a saved directory."""
    return Generation(load_model(directory), load_tokenizer(directory), prompt, params)
