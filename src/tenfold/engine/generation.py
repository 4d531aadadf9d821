"""Generating text with a model: prefill the prompt, then decode token by token."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from tenfold.device import one_torch_thread
from tenfold.engine import encoder_decoder
from tenfold.engine.loading import ANY, AnyModel, load_model_for
from tenfold.engine.runner import new_runner
from tenfold.engine.sampler import Sampler
from tenfold.engine.text import StoppedText, end_tokens
from tenfold.engine.usage import Usage
from tenfold.errors import TenfoldError
from tenfold.hub import resolve
from tenfold.memory import Budget
from tenfold.model.switch import SwitchTransformer
from tenfold.model.transformer import Transformer
from tenfold.packed import PackedModel
from tenfold.sampling import SamplingParams
from tenfold.tokenizer import Tokenizer, load_tokenizer


@torch.inference_mode()
def generate_tokens(
    model: Transformer | PackedModel,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    usage: Usage | None = None,
) -> Iterator[int]:
    """Tokens after the prompt, until the end-of-text token (not yielded) or `max_tokens`.

    `usage` is told what they cost.

    Raises TenfoldError for an empty prompt, for one that leaves no room in the context, and for
    a model that cannot generate.
    """
    if not prompt_ids:
        raise TenfoldError("the prompt is empty: give at least one token of text")
    room = context_of(model) - len(prompt_ids)
    if room < 1:
        raise TenfoldError(
            f"the prompt has {len(prompt_ids)} tokens; {context_name(model)} holds {context_of(model)}"
        )
    wanted = min(params.max_tokens, room)
    runner = new_runner(model, 1, len(prompt_ids) + wanted)
    sampler, usage = Sampler(params, prompt_ids), usage or Usage(model)
    step = torch.tensor([list(prompt_ids)])
    for position in range(wanted):
        spent = usage.decode if position else usage.prompt
        # Not around the loop: what goes on between two tokens is the caller's, other generations included.
        threads = one_torch_thread() if isinstance(model, PackedModel) else nullcontext()
        with threads, usage.step(spent, step.numel()):
            token = sampler(runner.forward(step)[0])
        if token in model.config.eos_token_ids and not params.ignore_eos:
            return
        yield token
        step = torch.tensor([[token]])


def new_tokens(
    model: AnyModel, prompt_ids: Sequence[int], params: SamplingParams, usage: Usage
) -> tuple[Iterator[int], int]:
    """The tokens to come, whichever kind of model it is, and how many there can be."""
    if isinstance(model, SwitchTransformer):
        return encoder_decoder.generate_tokens(model, prompt_ids, params), params.max_tokens
    room = context_of(model) - len(prompt_ids)
    return generate_tokens(model, prompt_ids, params, usage), min(params.max_tokens, room)


def context_of(model: Transformer | PackedModel) -> int:
    """Tokens a text may have: what the model was made for, or less where a memory budget leaves less."""
    plan = model.plan if isinstance(model, PackedModel) else None
    return plan.context if plan else model.config.max_position_embeddings


def context_name(model: Transformer | PackedModel) -> str:
    return (
        "the model's context (max_position_embeddings)"
        if context_of(model) == model.config.max_position_embeddings
        else "the context that the memory budget was planned for"
    )


def encode_prompt(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    if not ids and tokenizer.eos_token_id is not None:
        # A text begins where the one before it ended: that is how the model was trained.
        return [tokenizer.eos_token_id]
    return ids


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
        self.prompt_ids = encode_prompt(tokenizer, prompt)
        self.usage = Usage(model)
        self._text = StoppedText(tokenizer, params)
        self.finish_reason = "length"

    @property
    def tokens(self) -> list[int]:
        return self._text.tokens

    @property
    def text(self) -> str:
        return self._text.text

    def __iter__(self) -> Iterator[str]:
        """Pieces of text that no later token can change and no stop string will take back."""
        tokens, most = new_tokens(self.model, self.prompt_ids, self.params, self.usage)
        ends = end_tokens(self.tokenizer, (), self.params)
        for token in tokens:
            if token in ends:
                break
            if piece := self._text.add(token):
                yield piece
            if self._text.stopped:
                self.finish_reason = "stop"
                return
        if len(self.tokens) < most:
            self.finish_reason = "stop"
        if piece := self._text.finish():
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
            "usage": self.usage.summary(),
        }


def load_generation(
    path_or_id: str | Path, prompt: str, params: SamplingParams, memory: Budget = ANY
) -> Generation:
    """A generation with the model and tokenizer of a directory, a .gguf file or a hub id.

    What `memory` means and raises is `loading.load_packed_within`'s.
    """
    path = resolve(path_or_id)
    tokenizer = load_tokenizer(path)
    prompt_ids = encode_prompt(tokenizer, prompt)
    model = load_model_for(tokenizer, path, memory, len(prompt_ids) + params.max_tokens)
    return Generation(model, tokenizer, prompt_ids, params)
