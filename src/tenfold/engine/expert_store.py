"""The experts of a packed model that need not fit in memory: some in slots, all in files (csrc/store.hpp)."""

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from tenfold import compiled
from tenfold.checkpoint.pack.opened import Found
from tenfold.checkpoint.pack.verify import written_checksum
from tenfold.errors import TenfoldError

LEAST_SLOTS = 2
"""One expert is computed while the next is read."""


class StoreMeter(NamedTuple):
    """What a store has done since it was made."""

    hits: int
    """Experts that a layer's call wanted and that were in memory: one is counted once a call, however many
    of its tokens want it."""
    misses: int
    """Those that were not, or not yet."""
    bytes_read: int
    """All that was read of records, ahead of time or too late."""
    wait_seconds: float
    """That calls waited for experts with nothing left to compute."""
    prefetched: int
    """Experts that were read because a router, asked before its turn, seemed to want them."""
    prefetched_used: int
    """Those that were wanted when its turn came."""
    prefetched_late: int
    """Of these, still being read by then: misses too."""

    @property
    def prefetched_in_time(self) -> int:
        """Hits that would have been misses."""
        return self.prefetched_used - self.prefetched_late


class ExpertStore:
    """`slots` experts in memory, whichever are expected to be wanted soonest, and the rest read on demand.

    Experts are read past the page cache and checked against their checksums. A call that wants one which
    cannot be read, or is damaged, raises TenfoldError naming file, layer and expert. Any number of models
    run from one store take turns. A forked process starts with no expert in memory.
    """

    def __init__(self, layers: Sequence[Found], slots: int):
        """`layers` are the Experts of a packed directory. More slots than experts are not made.

        Raises TenfoldError for fewer slots than `LEAST_SLOTS`, for memory that the system does not give, for
        a file that cannot be opened, and for an expert without a checksum.
        """
        if slots < LEAST_SLOTS:
            raise TenfoldError(f"{slots} experts in memory are too few: at least {LEAST_SLOTS} are needed")
        self._numbers = {int(there.part.name.split(".")[1]): index for index, there in enumerate(layers)}
        self._counts = [len(there.raws) for there in layers]
        self.slots = min(slots, max(LEAST_SLOTS, sum(self._counts)))
        self.record_bytes = max(there.raws[0].num_bytes for there in layers)
        """Bytes of a slot: the largest record."""
        files = sorted({there.raws[0].file for there in layers})
        stored = []
        for number, (_, raws) in zip(self._numbers, layers, strict=True):
            checksums = [written_checksum(raw) for raw in raws]
            place = (files.index(raws[0].file), raws[0].offset, raws[0].num_bytes)
            stored.append((number, *place, checksums))
        try:
            self.native: Any = compiled.module().Store(
                [os.fsencode(file) for file in files], stored, self.slots
            )
        except MemoryError:
            needed = self.slots * self.record_bytes / 2**30
            raise TenfoldError(f"the system has no {needed:.1f} GiB for {self.slots:,} experts") from None

    def warm(self, experts: Iterable[tuple[int, int]]) -> None:
        """Read (layer, expert) pairs now, the first `slots` of them: layers as the model numbers them.

        Raises TenfoldError for a pair that the model does not have, and as a call does.
        """
        by_layer: dict[int, list[int]] = defaultdict(list)
        for layer, expert in list(experts)[: self.slots]:
            index = self._numbers.get(layer, -1)
            if index < 0 or not 0 <= expert < self._counts[index]:
                raise TenfoldError(f"layer {layer} has no expert {expert} to read ahead")
            by_layer[index].append(expert)
        for index, wanted in by_layer.items():
            self.native.warm(index, wanted)

    def meter(self) -> StoreMeter:
        return StoreMeter(*self.native.meter())
