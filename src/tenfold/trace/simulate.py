"""What a store of so many experts would have held of what a trace asks for: hits, by policy.

A call is one token at one layer, which wants its K experts at once. Stores begin empty.
"""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

import numpy as np
import numpy.typing as npt

from tenfold.trace.file import Ids

HALF_LIFE = 32
"""Tokens after which a use counts half for `lfu`: 16 to 64 are alike, and best, on demo models (LOG.md)."""
RARE = 1e-6
"""The chance of an expert that no token chose, as far as is remembered."""


def reuse_distances(ids_TLK: Ids, num_experts: int) -> npt.NDArray[np.int64]:
    """How many other experts of its layer were used since an expert was: (T, L, K); E at its first use.

    A least-recently-used store of c experts of a layer holds those whose distance is below c, whatever c
    (Mattson et al. 1970, "Evaluation techniques for storage hierarchies").
    """
    _, layers, top_k = ids_TLK.shape
    last_LE = np.full((layers, num_experts), -1)
    distances = np.empty(ids_TLK.shape, np.int64)
    order_K = np.arange(top_k)
    for token, ids_LK in enumerate(ids_TLK.astype(np.int64)):
        mine_LK = np.take_along_axis(last_LE, ids_LK, axis=1)
        since_LK = (last_LE[:, None] > mine_LK[..., None]).sum(-1)
        distances[token] = np.where(mine_LK < 0, num_experts, since_LK)
        np.put_along_axis(last_LE, ids_LK, (token * top_k + order_K)[None], axis=1)
    return distances


def lru_hits(distances: npt.NDArray[np.int64], num_experts: int) -> npt.NDArray[np.int64]:
    """Hits of each layer with room for 0, 1, … E of its experts: (L, E + 1)."""
    layers = range(distances.shape[1])
    counted = [np.bincount(distances[:, n].ravel(), minlength=num_experts)[:num_experts] for n in layers]
    return np.pad(np.cumsum(counted, axis=1), ((0, 0), (1, 0)))


def equal_lru(hits_LC: npt.NDArray[np.int64], slots: int) -> int:
    """As many slots for every layer, the first ones one more where they do not divide."""
    layers = len(hits_LC)
    return sum(int(hits[slots // layers + (n < slots % layers)]) for n, hits in enumerate(hits_LC))


def fitted_lru(hits_LC: npt.NDArray[np.int64], slots: int) -> npt.NDArray[np.int64]:
    """With 0, 1, … `slots` in all, shared out so that hits are most: the best that fitting could reach.

    Fitted to the very trace it is measured on, each layer to its hits by dynamic programming.
    """
    best = np.zeros(slots + 1, np.int64)
    for hits_C in hits_LC:
        without, best = best, best + hits_C[0]
        for room in range(1, min(slots, len(hits_C) - 1) + 1):
            np.maximum(best[room:], without[: slots + 1 - room] + hits_C[room], out=best[room:])
    return best


def calls_of(ids_TLK: Ids, num_experts: int) -> npt.NDArray[np.int64]:
    """The calls in order, with a number of its own for each expert of each layer: (T * L, K)."""
    layers, top_k = ids_TLK.shape[1:]
    first_L1 = num_experts * np.arange(layers)[:, None]
    return (ids_TLK + first_L1).reshape(-1, top_k)


def lfu(ids_TLK: Ids, num_experts: int, all_slots: Sequence[int], half_life: float = HALF_LIFE) -> list[int]:
    """Hits, for each number of slots, of a store for all layers that lets go what is likely used again last.

    As csrc/slots.cpp: a token chooses an expert with the probability that recent ones did, one counting half
    `half_life` tokens later, when its layer's turn comes. What is read stays until it has to make room, which
    the experts of one call do not for each other.
    """
    calls_CK, layers = calls_of(ids_TLK, num_experts), ids_TLK.shape[1]
    uses_LE, tokens_L = np.zeros((layers, num_experts)), np.zeros(layers)
    held = np.zeros((len(all_slots), uses_LE.size), bool)
    hits, free, fade = [0] * len(all_slots), list(all_slots), 0.5 ** (1 / half_life)
    for number, call_K in enumerate(calls_CK):
        layer = number % layers
        uses_LE[layer] *= fade
        uses_LE.ravel()[call_K] += 1
        tokens_L[layer] = tokens_L[layer] * fade + 1
        turns_L = (np.arange(layers) - layer - 1) % layers / layers
        chance_LE = uses_LE / np.maximum(tokens_L, 1)[:, None]
        wait_LE = 1 / np.maximum(chance_LE, RARE) + turns_L[:, None]
        for store, held_N in enumerate(held):
            missing = call_K[~held_N[call_K]]
            hits[store] += len(call_K) - len(missing)
            if len(missing) > free[store]:
                free[store] += _let_go(held_N, wait_LE.ravel(), call_K, len(missing) - free[store])
            held_N[missing[: free[store]]] = True
            free[store] -= min(free[store], len(missing))
    return hits


def _let_go(
    held_N: npt.NDArray[np.bool_],
    wait_N: npt.NDArray[np.float64],
    wanted_K: npt.NDArray[np.int64],
    count: int,
) -> int:
    """Let the `count` that have longest to wait go, of those not wanted now; how many there were."""
    waiting_N = np.where(held_N, wait_N, 0)
    waiting_N[wanted_K] = 0
    for gone in range(count):
        last = waiting_N.argmax()
        if waiting_N[last] == 0:
            return gone
        held_N[last], waiting_N[last] = False, 0
    return count


def belady(calls_CK: npt.NDArray[np.int64], slots: int) -> int:
    """Hits of one store for all layers that keeps after each call what is used again soonest.

    No policy has more, not even one that need not keep what it has just read (Belady 1966, "A study of
    replacement algorithms for a virtual-storage computer").
    """
    next_use = [-1] * (int(calls_CK.max()) + 1)  # of what is held, else -1
    # Of what is held, the last used again first. Entries for uses that are past come after all others.
    heap: list[tuple[int, int]] = []
    hits, held = 0, 0
    for call_K, after_K in zip(calls_CK, next_uses(calls_CK), strict=True):
        call = call_K.tolist()
        there = sum(next_use[expert] >= 0 for expert in call)
        hits += there
        held += len(call) - there
        for expert, due in zip(call, after_K.tolist(), strict=True):
            next_use[expert] = due
            heappush(heap, (-due, expert))
        while held > slots:
            next_use[heappop(heap)[1]] = -1
            held -= 1
        if len(heap) > 4 * len(next_use):
            heap = [(-due, expert) for expert, due in enumerate(next_use) if due >= 0]
            heapify(heap)
    return hits


def next_uses(calls_CK: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The number of the next call that wants the same expert; for the last that of a call never made."""
    flat = calls_CK.ravel()
    order = np.argsort(flat, kind="stable")
    again = flat[order][1:] == flat[order][:-1]
    following = np.full(len(flat), len(calls_CK))
    following[order[:-1][again]] = order[1:][again] // calls_CK.shape[1]
    return following.reshape(calls_CK.shape)
