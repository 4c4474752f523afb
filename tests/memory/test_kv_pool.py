"""Pages are shared, copied when written by a second owner, and never more than the budget."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agentctx.memory.errors import ModelError
from agentctx.memory.kv.pool import PAGE_TOKENS, KVShape, PagePool
from agentctx.memory.kv.table import BlockTable, stacked

SHAPE = KVShape(layers=2, kv_heads=1, head_dim=16, dtype=torch.float32)


def pool(pages: int) -> PagePool:
    return PagePool(SHAPE, budget=pages * SHAPE.page_bytes)


def test_a_page_comes_back_as_it_was_written() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        shape = KVShape(3, 2, 64, dtype)
        some = PagePool(shape, budget=4 * shape.page_bytes)
        k, v = torch.randn(2, 3, 2, 40, 64).to(dtype)
        some.write(2, k, v)
        again = some.read(2, 40)
        assert torch.equal(again[0], k) and torch.equal(again[1], v)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_is_committed_only_where_it_is_written() -> None:
    before = resident()
    large = PagePool(SHAPE, budget=2 << 30)
    large.take(3)
    large.write(2, *torch.randn(2, 2, 1, 64, 16))
    assert resident() - before < 100 << 20
    assert large.used_bytes == 3 * SHAPE.page_bytes
    assert not bool(large.read(1000, 64)[0].any())


def test_more_than_the_system_gives_is_refused() -> None:
    with pytest.raises(ModelError, match="does not reserve") as caught:
        PagePool(SHAPE, budget=1 << 50)
    assert caught.value.code == "out_of_memory"


def test_too_many_tokens_are_refused_and_nothing_is_lost() -> None:
    some = pool(2)
    table = BlockTable(some)
    table.reserve(PAGE_TOKENS + 1)
    with pytest.raises(ModelError, match="room for 0 more tokens, 64 are needed") as caught:
        table.reserve(2 * PAGE_TOKENS + 1)
    assert caught.value.code == "out_of_memory"
    assert len(table.pages) == 2 and some.used_pages == 2


def test_no_room_for_a_single_page() -> None:
    with pytest.raises(ModelError, match="room for 0 more") as caught:
        PagePool(SHAPE, budget=10)
    assert "memory_bytes" in caught.value.hint


def test_rows_of_different_lengths_stack() -> None:
    some = pool(6)
    long, short = BlockTable(some), BlockTable(some)
    long.reserve(3 * PAGE_TOKENS)
    short.reserve(1)
    assert stacked([long, short]).tolist() == [long.pages, [*short.pages, 0, 0]]


class Sharing(RuleBasedStateMachine):
    """Sequences that grow, fork, shrink and end, against plain lists of what each of them wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool(12)
        self.tables: list[tuple[BlockTable, list[float]]] = [(BlockTable(self.pool), [])]
        self.next = 1.0

    @rule(which=st.integers(0, 9), count=st.integers(1, 100))
    def grow(self, which: int, count: int) -> None:
        table, wrote = self.tables[which % len(self.tables)]
        try:
            table.reserve(table.tokens + count)
        except ModelError:
            return
        for _ in range(count):
            page, slot = table.pages[table.tokens // PAGE_TOKENS], table.tokens % PAGE_TOKENS
            k, v = (x.clone() for x in self.pool.read(page, PAGE_TOKENS))
            k[:, :, slot], v[:, :, slot] = self.next, -self.next
            self.pool.write(page, k, v)
            table.tokens += 1
            wrote.append(self.next)
            self.next += 1

    @rule(which=st.integers(0, 9))
    def fork(self, which: int) -> None:
        table, wrote = self.tables[which % len(self.tables)]
        self.tables.append((table.fork(), list(wrote)))

    @rule(which=st.integers(0, 9), keep=st.floats(0, 1))
    def crop(self, which: int, keep: float) -> None:
        table, wrote = self.tables[which % len(self.tables)]
        tokens = int(len(wrote) * keep)
        table.crop(tokens)
        del wrote[tokens:]

    @precondition(lambda self: len(self.tables) > 1)
    @rule(which=st.integers(0, 9))
    def close(self, which: int) -> None:
        self.tables.pop(which % len(self.tables))[0].close()

    @invariant()
    def every_sequence_holds_what_it_wrote(self) -> None:
        for table, wrote in self.tables:
            held = [self.pool.read(page, PAGE_TOKENS)[0][0, 0, :, 0] for page in table.pages]
            flat = torch.cat(held)[: len(wrote)].tolist() if held else []
            assert flat == wrote

    @invariant()
    def no_page_is_lost(self) -> None:
        owned = {page for table, _ in self.tables for page in table.pages}
        assert self.pool.used_pages == len(owned)
        assert self.pool.used_bytes <= self.pool.budget


TestSharing = Sharing.TestCase
TestSharing.settings = settings(max_examples=25, stateful_step_count=20, deadline=None, derandomize=True)
