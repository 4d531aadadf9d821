"""Prefill and decode against the clock."""

import statistics
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tenfold import compiled
from tenfold.bench.settings import BenchSettings
from tenfold.engine.runner import Runner
from tenfold.engine.usage import Usage

ROUNDS = 5


@dataclass(frozen=True)
class Speed:
    """Medians of ROUNDS."""

    prefill: float
    """Seconds for the whole prompt, in every sequence."""
    decode_step: float
    """Seconds for one token in every sequence."""
    python_overhead: float | None
    """Share of a decode step spent outside the native kernels; None where there are none."""


class Round(NamedTuple):
    """One prompt and what is decoded after it, in seconds."""

    prefill: float
    decode_step: float
    native_share: float
    """Of the decoding, spent in the native kernels."""


def measure(runner: Runner, vocab_size: int, settings: BenchSettings) -> Speed:
    """The same tokens in every round, after one round that is not counted."""
    ids_BS = random_ids(vocab_size, settings.batch, settings.prompt_tokens + settings.tokens)
    rounds = [one_round(runner, ids_BS, settings.prompt_tokens) for _ in range(ROUNDS + 1)][1:]
    share = statistics.median(each.native_share for each in rounds)
    return Speed(
        statistics.median(each.prefill for each in rounds),
        statistics.median(each.decode_step for each in rounds),
        1 - share if share else None,
    )


def random_ids(vocab_size: int, batch: int, tokens: int, seed: int = 0) -> Tensor:
    """(batch, tokens). Not what a model would choose, so that sequences, and their experts, differ."""
    return torch.randint(vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def one_round(runner: Runner, ids_BS: Tensor, prompt_tokens: int) -> Round:
    """The first `prompt_tokens` at once, the others one by one."""
    runner.reset()
    start = time.perf_counter()
    runner.forward(ids_BS[:, :prompt_tokens])
    middle, busy = time.perf_counter(), native_seconds()
    for position in range(prompt_tokens, ids_BS.shape[1]):
        runner.forward(ids_BS[:, position : position + 1])
    decoding = time.perf_counter() - middle
    share = (native_seconds() - busy) / decoding
    return Round(middle - start, decoding / (ids_BS.shape[1] - prompt_tokens), share)


def native_seconds() -> float:
    """Spent in native calls so far; 0 where the kernels are not used."""
    return float(compiled.module().busy_seconds()) if compiled.available() else 0.0


@torch.inference_mode()
def metered_round(runner: Runner, ids_BS: Tensor, prompt_tokens: int, usage: Usage) -> None:
    """The same as `one_round`, told to `usage`."""
    runner.reset()
    with usage.step(usage.prompt, ids_BS[:, :prompt_tokens].numel()):
        runner.forward(ids_BS[:, :prompt_tokens])
    for position in range(prompt_tokens, ids_BS.shape[1]):
        with usage.step(usage.decode, len(ids_BS)):
            runner.forward(ids_BS[:, position : position + 1])
