"""Generating text with a model: prefill the prompt, then decode token by token."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from tenfold.device import one_torch_thread
from tenfold.engine import encoder_decoder
from tenfold.engine.loading import AnyModel, load_model_and_tokenizer
from tenfold.engine.runner import new_runner
from tenfold.engine.sampler import Sampler
from tenfold.errors import TenfoldError
from tenfold.model.switch import SwitchTransformer
from tenfold.model.transformer import Transformer
from tenfold.packed import PackedModel
from tenfold.sampling import SamplingParams
from tenfold.tokenizer import TextStream, Tokenizer


@torch.inference_mode()
def generate_tokens(
    model: Transformer | PackedModel, prompt_ids: Sequence[int], params: SamplingParams
) -> Iterator[int]:
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
    runner = new_runner(model, 1, len(prompt_ids) + wanted)
    sampler = Sampler(params)
    step = torch.tensor([list(prompt_ids)])
    for _ in range(wanted):
        # Not around the loop: what goes on between two tokens is the caller's, other generations included.
        with one_torch_thread() if isinstance(model, PackedModel) else nullcontext():
            token = sampler(runner.forward(step)[0])
        if token in config.eos_token_ids:
            return
        yield token
        step = torch.tensor([[token]])


def new_tokens(
    model: AnyModel, prompt_ids: Sequence[int], params: SamplingParams
) -> tuple[Iterator[int], int]:
    """The tokens to come, whichever kind of model it is, and how many there can be."""
    if isinstance(model, SwitchTransformer):
        return encoder_decoder.generate_tokens(model, prompt_ids, params), params.max_tokens
    room = model.config.max_position_embeddings - len(prompt_ids)
    return generate_tokens(model, prompt_ids, params), min(params.max_tokens, room)


class Generation:
    """Text as it is generated: iterate for the pieces; then `text`, `tokens` and `finish_reason`.

    `finish_reason` is "stop" at the end of the text or at a stop string, "length" where `max_tokens`
    or the model's context ran out.
    """

    def __init__(
        self, model: AnyModel, tokenizer: Tokenizer, prompt: str | Sequence[int], params: SamplingParams
    ):
        """`prompt` is text, or token ids that are taken as they are."""
        self.model, self.tokenizer, self.params = model, tokenizer, params
        self.prompt_ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not self.prompt_ids and tokenizer.eos_token_id is not None:
            # A text begins where the one before it ended: that is how the model was trained.
            self.prompt_ids = [tokenizer.eos_token_id]
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason = "length"

    def __iter__(self) -> Iterator[str]:
        """Pieces of text that no later token can change and no stop string will take back."""
        stream, whole = TextStream(self.tokenizer), ""
        tokens, most = new_tokens(self.model, self.prompt_ids, self.params)
        for token in tokens:
            if token in self.tokenizer.eos_token_ids:
                break
            self.tokens.append(token)
            whole += stream.step(token)
            if (cut := self._stop_at(whole)) is not None:
                self.finish_reason = "stop"
                yield from self._advance(whole[:cut])
                return
            yield from self._advance(whole[: len(whole) - self._begun_stop(whole)])
        if len(self.tokens) < most:
            self.finish_reason = "stop"
        yield from self._advance(self.tokenizer.decode(self.tokens))

    def _stop_at(self, whole: str) -> int | None:
        found = [at for stop in self.params.stop if (at := whole.find(stop)) >= 0]
        return min(found, default=None)

    def _begun_stop(self, whole: str) -> int:
        """How many last characters may be the beginning of a stop string."""
        return max(
            (
                size
                for stop in self.params.stop
                for size in range(1, min(len(stop), len(whole) + 1))
                if whole.endswith(stop[:size])
            ),
            default=0,
        )

    def _advance(self, text: str) -> Iterator[str]:
        if len(text) > len(self.text):
            piece, self.text = text[len(self.text) :], text
            yield piece

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


def load_generation(path_or_id: str | Path, prompt: str, params: SamplingParams) -> Generation:
    """A generation with the model and tokenizer of a directory, a .gguf file or a hub id."""
    return Generation(*load_model_and_tokenizer(path_or_id), prompt, params)
