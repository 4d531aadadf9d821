"""The blocks of a KV cache: who has which, and which still hold the beginning of a text that may be back."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from tenfold.engine.batch import BatchRunner

_Key = tuple[int, tuple[int, ...]]
_ROOT = 0


@dataclass
class Table:
    """The blocks of one sequence, in order."""

    blocks: list[int] = field(default_factory=list)
    kept: int = 0
    """How many of them are full and known to `Blocks` by their content."""
    _last: int = _ROOT
    """The number of the beginning that these hold."""


class Blocks:
    """Each block is free, or has one or several sequences that read it; one that is written has only one.

    A full block is known by the number of the beginning that it continues and its own tokens: compared in
    full, so that no collision shows one user another's text. Free blocks keep their content until they are
    taken, the least recently used first.
    """

    def __init__(self, runner: BatchRunner):
        self._runner, self.size, self.count = runner, runner.block_size, runner.num_blocks
        self._free = OrderedDict.fromkeys(range(self.count))
        self._readers = [0] * self.count
        self._keys: list[_Key | None] = [None] * self.count
        self._known: dict[_Key, tuple[int, int]] = {}  # to the block and the number of the beginning
        self._numbers = count(_ROOT + 1)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.count - len(self._free)

    def needed(self, positions: int) -> int:
        return -(-positions // self.size)

    def open(self, ids: Sequence[int], reuse: bool, spare: int = 0) -> tuple[Table, int] | None:
        """Blocks for all of `ids`, and how many of these are in them already: never all, since a pass has
        to begin with a token. None where they would not leave `spare` blocks free."""
        table = Table()
        if reuse:
            self._find(table, ids)
        taken = sum(not self._readers[block] for block in table.blocks)
        missing = self.needed(len(ids)) - len(table.blocks)
        if taken + missing + spare > self.free:
            return None
        for block in table.blocks:
            self._free.pop(block, None)
            self._readers[block] += 1
        self.grow(table, len(ids))
        return table, table.kept * self.size

    def _find(self, table: Table, ids: Sequence[int]) -> None:
        for start in range(0, len(ids) - self.size, self.size):
            found = self._known.get((table._last, tuple(ids[start : start + self.size])))
            if found is None:
                return
            block, table._last = found
            table.blocks.append(block)
            table.kept += 1

    def grow(self, table: Table, positions: int) -> bool:
        """Room for `positions`; False, and nothing changes, where there are not enough blocks."""
        missing = self.needed(positions) - len(table.blocks)
        if missing > self.free:
            return False
        fresh = [self._take() for _ in range(missing)]
        if fresh:
            self._runner.clear(fresh)
        table.blocks += fresh
        return True

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        if (key := self._keys[block]) is not None:
            del self._known[key]
            self._keys[block] = None
        self._readers[block] = 1
        return block

    def keep(self, table: Table, ids: Sequence[int], cached: int) -> None:
        """Remember the content of the blocks that the first `cached` of `ids` fill: those are written."""
        while (end := (table.kept + 1) * self.size) <= cached:
            key = (table._last, tuple(ids[end - self.size : end]))
            if key in self._known:  # by another that had the same text at the same time
                _, table._last = self._known[key]
            else:
                block, table._last = table.blocks[table.kept], next(self._numbers)
                self._known[key] = (block, table._last)
                self._keys[block] = key
            table.kept += 1

    def close(self, table: Table) -> None:
        """A beginning outlives what continues it: of what is free, the last blocks are taken first."""
        for block in reversed(table.blocks):
            self._readers[block] -= 1
            if not self._readers[block]:
                self._free[block] = None
        table.blocks = []
