"""Blocks of a KV cache: none lost, none in two hands, and what is known again is the same text."""

from collections import Counter

import pytest
from fake_runner import FakeRunner, fake_config
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tenfold.engine.blocks import Blocks, Table

SIZE, COUNT = 3, 9


class Use(RuleBasedStateMachine):
    """Any number of sequences that come, grow and go; `content` is what their passes wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = FakeRunner(fake_config(300), COUNT, SIZE)
        self.blocks = Blocks(self.runner)
        self.content: dict[tuple[int, int], int] = {}
        self.open: list[tuple[Table, list[int]]] = []

    def write(self, table: Table, ids: list[int], start: int) -> None:
        for position in range(start, len(ids)):
            self.content[table.blocks[position // SIZE], position % SIZE] = ids[position]
        self.blocks.keep(table, ids, len(ids))

    @rule(
        ids=st.lists(st.integers(1, 2), min_size=1, max_size=16), reuse=st.booleans(), spare=st.integers(0, 3)
    )
    def begin(self, ids: list[int], reuse: bool, spare: int) -> None:
        free = self.blocks.free
        opened = self.blocks.open(ids, reuse, spare)
        if opened is None:
            assert self.blocks.free == free < self.blocks.needed(len(ids)) + spare
            return
        table, known = opened
        assert known < len(ids) and known % SIZE == 0 and (reuse or not known)
        assert self.blocks.free >= spare
        assert [self.content[table.blocks[at // SIZE], at % SIZE] for at in range(known)] == ids[:known]
        self.write(table, ids, known)
        self.open.append((table, ids))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), more=st.lists(st.integers(1, 2), min_size=1, max_size=5))
    def grow(self, data: st.DataObject, more: list[int]) -> None:
        table, ids = data.draw(st.sampled_from(self.open))
        start, had = len(ids), list(table.blocks)
        if self.blocks.grow(table, len(ids) + len(more)):
            ids += more
            self.write(table, ids, start)
        else:
            assert table.blocks == had

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        which = data.draw(st.integers(0, len(self.open) - 1))
        table, _ = self.open.pop(which)
        self.blocks.close(table)

    @invariant()
    def each_is_somewhere_and_says_what_it_should(self) -> None:
        held = {block for table, _ in self.open for block in table.blocks}
        assert self.blocks.used == len(held) and self.blocks.free == COUNT - len(held)
        for table, ids in self.open:
            found = [self.content[table.blocks[at // SIZE], at % SIZE] for at in range(len(ids))]
            assert found == ids
        assert all(
            n == 1 for n in Counter(b for t, ids in self.open for b in t.blocks[len(ids) // SIZE :]).values()
        )


TestUse = Use.TestCase
TestUse.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.fixture
def blocks() -> Blocks:
    return Blocks(FakeRunner(fake_config(300), 6, 2))


def hold(blocks: Blocks, ids: list[int]) -> tuple[Table, int]:
    opened = blocks.open(ids, True)
    assert opened is not None
    blocks.keep(opened[0], ids, len(ids))
    return opened


def test_what_was_used_last_is_kept_longest_and_beginnings_before_what_follows(blocks: Blocks) -> None:
    for ids in ([1, 1, 2, 2, 3, 3], [4, 4, 5, 5], [1, 1, 2, 2, 9, 9]):
        table, known = hold(blocks, ids)
        blocks.close(table)
    assert known == 4
    table, _ = hold(blocks, [6, 6, 7, 7])  # takes what is oldest: the ends of the first two
    blocks.close(table)
    assert hold(blocks, [1, 1, 2, 2, 8])[1] == 4
    assert hold(blocks, [4, 4, 5])[1] == 0


def test_fresh_blocks_are_cleared_and_known_ones_are_not(blocks: Blocks) -> None:
    cleared: list[int] = []
    blocks._runner.clear = cleared.extend  # type: ignore[method-assign]
    table, _ = hold(blocks, [1, 1, 2])
    first, second = table.blocks
    assert cleared == [first, second]
    blocks.close(table)
    cleared.clear()
    again, _ = hold(blocks, [1, 1, 3])
    assert again.blocks[0] == first and cleared == again.blocks[1:]
