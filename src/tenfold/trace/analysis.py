"""What a trace says: names as in `trace --json`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tenfold.trace import simulate
from tenfold.trace.file import Ids, Trace, counts

MEMORY = (0.1, 0.2, 0.25, 0.33, 0.4, 0.5, 0.6, 0.67, 0.75, 0.9)
"""Shares of the experts that there is room for."""


def analyse(trace: Trace) -> dict[str, Any]:
    """Hit rate against memory, reuse, look-ahead and load; every share is of 1.

    `reuse_within[d]` is the share of uses before which at most d other experts of the layer had been used
    since the expert was, `repeated` that of uses by a token of what the token before it used too.
    `load[kind]` (layers, experts) has 1 for a fair share.
    """
    header = trace.header
    unforeseen = len(header.layers) - len(header.foreseen)
    distances = simulate.reuse_distances(trace.experts_TLK, header.num_experts)
    seen = np.bincount(distances.ravel(), minlength=header.num_experts + 1)
    return {
        "model": header.model,
        "tokens": header.tokens,
        "layers": list(header.layers),
        "num_experts": header.num_experts,
        "num_experts_per_tok": header.num_experts_per_tok,
        "expert_bytes": header.expert_bytes,
        "hit_rate": hit_rates(trace),
        "reuse_within": (seen.cumsum() / seen.sum())[:-1].tolist(),
        "reuse_distance_median": np.median(distances, axis=(0, 2)).tolist(),
        "repeated": _shared(trace.experts_TLK[1:], trace.experts_TLK[:-1]),
        "lookahead_layers": list(header.foreseen),
        "lookahead": _shared(trace.lookahead_TLK, trace.experts_TLK[:, unforeseen:]),
        "load": _load(trace),
    }


def hit_rates(trace: Trace, memory: Sequence[float] = MEMORY) -> list[dict[str, float]]:
    """One entry for each share of the experts: `memory`, `slots`, `bytes`, and the policies' hit rates."""
    ids_TLK, E = trace.experts_TLK, trace.header.num_experts
    layers = ids_TLK.shape[1]
    all_slots = [max(1, round(share * layers * E)) for share in memory]
    hits_LC = simulate.lru_hits(simulate.reuse_distances(ids_TLK, E), E)
    fitted = simulate.fitted_lru(hits_LC, max(all_slots))
    calls_CK = simulate.calls_of(ids_TLK, E)
    return [
        {
            "memory": share,
            "slots": slots,
            "bytes": slots * trace.header.expert_bytes,
            "lru": simulate.equal_lru(hits_LC, slots) / ids_TLK.size,
            "fitted": int(fitted[slots]) / ids_TLK.size,
            "lfu": simulate.lfu(calls_CK, layers, slots) / ids_TLK.size,
            "belady": simulate.belady(calls_CK, slots) / ids_TLK.size,
        }
        for share, slots in zip(memory, all_slots, strict=True)
    ]


def _shared(guess_TLK: Ids, truth_TLK: Ids) -> list[float]:
    """The share of what a token chose that was guessed, by layer."""
    guesses, truths = guess_TLK.swapaxes(0, 1), truth_TLK.swapaxes(0, 1)
    return [
        float((guess[:, :, None] == truth[:, None]).any(1).mean()) if len(guess) else 0.0
        for guess, truth in zip(guesses, truths, strict=True)
    ]


def _load(trace: Trace) -> dict[str, list[list[float]]]:
    header, first = trace.header, 0
    load: dict[str, list[list[float]]] = {}
    for segment in header.segments:
        part_TLK = trace.experts_TLK[first : first + segment.tokens]
        first += segment.tokens
        uses_LE = counts(part_TLK, header.num_experts)
        load[segment.kind] = (uses_LE / uses_LE.mean(1, keepdims=True)).tolist()
    return load
