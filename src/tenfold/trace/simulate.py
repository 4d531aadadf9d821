"""What a store of so many experts would have held of what a trace asks for: hits, by policy.

A call is one token at one layer, which wants its K experts at once. Stores begin empty.
"""

from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt

from tenfold.trace.file import Ids

HALF_LIFE = 32
"""Tokens after which a use counts half for `lfu`."""
LARGEST = 1e100
"""Of the counts that `lfu` works with, which only grow until they are scaled back."""


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


def lfu(calls_CK: npt.NDArray[np.int64], layers: int, slots: int, half_life: float = HALF_LIFE) -> int:
    """Hits of one store for all layers that lets go what was used least, old uses counting less.

    A use counts half after every `half_life` tokens. What is read stays until it has to make room, which the
    experts of one call do not for each other. csrc/slots.cpp does the same, and among equals lets go first
    what its layer's turn will come to last.
    """
    uses = [0.0] * (int(calls_CK.max()) + 1)
    held = bytearray(len(uses))
    heap: list[tuple[float, int]] = []  # what is held, by its uses when they were last looked at
    growth, weight, hits, free = 2 ** (1 / half_life), 1.0, 0, slots
    for number, call in enumerate(calls_CK.tolist()):
        if number % layers == 0:
            weight *= growth  # the uses to come count more: in proportion, that those before count less
            if weight > LARGEST:
                uses = [use / weight for use in uses]
                heap = [(use / weight, expert) for use, expert in heap]
                weight = 1.0
        for expert in call:
            uses[expert] += weight
        missing = [expert for expert in call if not held[expert]]
        hits += len(call) - len(missing)
        if free < len(missing):
            free += _let_go(heap, uses, held, set(call), len(missing) - free)
        for expert in missing[:free]:
            held[expert] = True
            heappush(heap, (uses[expert], expert))
        free -= min(free, len(missing))
    return hits


def _let_go(
    heap: list[tuple[float, int]], uses: list[float], held: bytearray, wanted: set[int], count: int
) -> int:
    """Let the `count` least used go that are not wanted now; how many there were."""
    kept, gone = [], 0
    while heap and gone < count:
        seen, expert = heappop(heap)
        if expert in wanted:
            kept.append((uses[expert], expert))
        elif seen < uses[expert]:
            heappush(heap, (uses[expert], expert))
        else:
            held[expert] = False
            gone += 1
    for entry in kept:
        heappush(heap, entry)
    return gone


def belady(calls_CK: npt.NDArray[np.int64], slots: int) -> int:
    """Hits of one store for all layers that keeps after each call what is used again soonest.

    No policy has more, not even one that need not keep what it has just read (Belady 1966, "A study of
    replacement algorithms for a virtual-storage computer").
    """
    next_use = [-1] * (int(calls_CK.max()) + 1)  # of what is held, else -1
    heap: list[tuple[int, int]] = []  # of what is held, the last used again first, with much that is outdated
    hits, held = 0, 0
    for call, after in zip(calls_CK.tolist(), next_uses(calls_CK).tolist(), strict=True):
        there = sum(next_use[expert] >= 0 for expert in call)
        hits += there
        held += len(call) - there
        for expert, due in zip(call, after, strict=True):
            next_use[expert] = due
            heappush(heap, (-due, expert))
        while held > slots:
            due, expert = heappop(heap)
            if next_use[expert] == -due:
                next_use[expert] = -1
                held -= 1
    return hits


def next_uses(calls_CK: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The number of the next call that wants the same expert; for the last that of a call never made."""
    flat = calls_CK.ravel()
    order = np.argsort(flat, kind="stable")
    again = flat[order][1:] == flat[order][:-1]
    following = np.full(len(flat), len(calls_CK))
    following[order[:-1][again]] = order[1:][again] // calls_CK.shape[1]
    return following.reshape(calls_CK.shape)
