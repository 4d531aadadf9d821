"""Prefill and decode against the clock."""

import statistics
import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tenfold.bench.settings import BenchSettings
from tenfold.kernels import native

ROUNDS = 5


class Runner(Protocol):
    """A model with its caches."""

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Append the tokens; logits (B, V) after the last."""
        ...

    def reset(self) -> None:
        """Forget every token."""
        ...


@dataclass(frozen=True)
class Speed:
    """Medians of ROUNDS."""

    prefill: float
    """Seconds for the whole prompt, in every sequence."""
    decode_step: float
    """Seconds for one token in every sequence."""
    python_overhead: float | None
    """Share of a decode step spent outside the native kernels; None where there are none."""


@torch.inference_mode()
def measure(runner: Runner, vocab_size: int, settings: BenchSettings) -> Speed:
    """Random tokens, the same in every round, after one round that is not counted.

    The tokens are not those the model would choose, so that sequences, and their experts, differ.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (settings.batch, settings.prompt_tokens + settings.tokens)
    ids_BS = torch.randint(vocab_size, shape, generator=generator)
    prefill, decode, outside = [], [], []
    for turn in range(ROUNDS + 1):
        runner.reset()
        start = time.perf_counter()
        runner.forward(ids_BS[:, : settings.prompt_tokens])
        middle, busy = time.perf_counter(), native_seconds()
        for position in range(settings.prompt_tokens, ids_BS.shape[1]):
            runner.forward(ids_BS[:, position : position + 1])
        decoding = time.perf_counter() - middle
        if turn:
            prefill.append(middle - start)
            decode.append(decoding / settings.tokens)
            outside.append(1 - (native_seconds() - busy) / decoding)
    overhead = statistics.median(outside) if native_seconds() else None
    return Speed(statistics.median(prefill), statistics.median(decode), overhead)


def native_seconds() -> float:
    """Spent in native calls so far; 0 where the kernels are not used."""
    if not native.available():
        return 0.0
    from tenfold import _native

    return float(_native.busy_seconds())
