"""A model with its KV caches, one step at a time: what generates tokens, whichever way they are computed."""

from typing import Protocol

import torch
from torch import Tensor

from tenfold.engine.kv_cache import new_kv_cache
from tenfold.engine.packed import PackedRunner
from tenfold.errors import TenfoldError
from tenfold.memory import check_fits
from tenfold.model.transformer import Transformer
from tenfold.packed import PackedModel


class Runner(Protocol):
    """`batch` sequences of equal length."""

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Append the tokens; logits (B, V) after the last."""
        ...

    def reset(self) -> None:
        """Forget every token."""
        ...


class TorchRunner:
    """A model of floating-point weights, wherever it lies."""

    def __init__(self, model: Transformer, batch: int, capacity: int):
        weight = model.embed_tokens.weight
        self._model, self._device = model, weight.device
        self._cache = new_kv_cache(model.config, batch, capacity, weight.dtype, weight.device)

    def reset(self) -> None:
        for layer in self._cache:
            layer.length = 0

    @torch.inference_mode()
    def forward(self, ids_BS: Tensor) -> Tensor:
        hidden_BSD, _ = self._model.hidden_states(ids_BS.to(self._device), self._cache, self._cache[0].length)
        return self._model.logits(hidden_BSD[:, -1])


def new_runner(model: Transformer | PackedModel, batch: int, capacity: int) -> Runner:
    """With caches for `capacity` positions of `batch` sequences.

    Raises TenfoldError where those could never fit the memory, or are more than the model's budget plans for.
    """
    plan = model.plan if isinstance(model, PackedModel) else None
    if plan and (batch > plan.batch or capacity > plan.context):
        raise TenfoldError(
            f"{batch} x {capacity:,} tokens are more than the {plan.batch} x {plan.context:,} that the memory"
            " budget was planned for"
        )
    cache_bytes = batch * capacity * model.config.kv_bytes_per_token("bfloat16")
    check_fits(cache_bytes, f"a KV cache for {capacity:,} tokens", "ask for fewer of them")
    runner = PackedRunner if isinstance(model, PackedModel) else TorchRunner
    return runner(model, batch, capacity)  # type: ignore[arg-type]
