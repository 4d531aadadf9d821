"""Measured speed of decoding."""

import time

import torch

from tenfold.engine.kv_cache import new_kv_cache
from tenfold.model.transformer import Transformer


def decode_tokens_per_second(
    models: dict[str, Transformer], tokens: int, rounds: int = 5
) -> dict[str, float]:
    """Greedy tokens a second at batch 1 after a prompt of one token: the median of `rounds`.

    The models take turns in every round, so that a slow spell of the machine meets them all.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            seconds[name].append(_decode_seconds(model, tokens))
    return {name: tokens / sorted(times)[rounds // 2] for name, times in seconds.items()}


@torch.inference_mode()
def _decode_seconds(model: Transformer, tokens: int) -> float:
    """Seconds for `tokens` steps of one token, whatever they are: the end of text does not stop it."""
    weight = model.embed_tokens.weight
    cache = new_kv_cache(model.config, 1, tokens, weight.dtype, weight.device)
    token = torch.zeros(1, 1, dtype=torch.long, device=weight.device)
    start = time.perf_counter()
    for position in range(tokens):
        token = model(token, cache, position)[:, -1:].argmax(-1)
    int(token)
    return time.perf_counter() - start
