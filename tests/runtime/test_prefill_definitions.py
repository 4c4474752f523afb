"""What blocktopk and flex let a text read of itself, against their definitions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from agentctx.memory.kv.pool import KVShape, PagePool
from agentctx.memory.kv.table import BlockTable
from agentctx.runtime.layer import LayerKV, Scoring
from agentctx.runtime.methods.blocktopk import BlockTopK
from agentctx.runtime.methods.flexprefill import FlexPrefill
from agentctx.runtime.methods.prefill import BlockPrefill
from agentctx.runtime.notes import Notes

SIZE, START, END, GROUP = 32, 512, 1000, 3
Lists = list[list[list[int]]]  # of each KV head and run of 128 rows


def sequence(seed: int) -> tuple[Tensor, Tensor, LayerKV]:
    """q `[1, 6, T, D]` of the rows from START on, k `[2, END, D]`, and the layer that holds it."""
    chance = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 2, END, SIZE, generator=chance).unbind(0)
    q = 2 * torch.randn(1, 2 * GROUP, END - START, SIZE, generator=chance)
    k = k + torch.randn(2, END // 40, SIZE, generator=chance).repeat_interleave(40, 1)
    pool = PagePool(KVShape(1, 2, SIZE, torch.float32), budget=1 << 22)
    table = BlockTable(pool)
    table.reserve(END)
    for at, page in enumerate(table.pages):
        some = slice(64 * at, min(64 * at + 64, END))
        pool.write(page, k[None, :, some], v[None, :, some])
    table.tokens = END
    lens = torch.tensor([END], dtype=torch.int32)
    scoring = Scoring(SIZE**-0.5)
    return q, k, LayerKV(2, pool.layers[0], table.ids[None], lens, END, scoring, True, [Notes()], layers=3)


def lists_of(some: BlockPrefill, q: Tensor, kv: LayerKV, monkeypatch: pytest.MonkeyPatch) -> list[Lists]:
    """The lists of every call of the kernel."""
    calls: list[Lists] = []
    inner = BlockPrefill.attend_lists

    def watched(self: BlockPrefill, q: Tensor, kv: LayerKV, blocks: Tensor, counts: Tensor) -> object:
        calls.append(
            [
                [row[:count].tolist() for row, count in zip(*head, strict=True)]
                for head in zip(blocks[0], counts[0], strict=True)
            ]
        )
        return inner(self, q, kv, blocks, counts)

    monkeypatch.setattr(BlockPrefill, "attend_lists", watched)
    some.part(q, kv)
    return calls


def shares(q: Tensor, k: Tensor, blocks: int) -> Tensor:
    """What a query q `[G, D]` gives each of the first blocks, by mean keys; the mean over its heads."""
    means = torch.stack([k[64 * b : 64 * b + 64].double().mean(0) for b in range(blocks)])
    return (q.double() @ means.T * SIZE**-0.5).softmax(-1).mean(0)


def heads_of(q: Tensor, head: int) -> Tensor:
    return q[0, head * GROUP : (head + 1) * GROUP]


@pytest.mark.parametrize("seed", range(4))
def test_blocktopk(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, kv = sequence(seed)
    (found,) = lists_of(BlockTopK(budget=256, dense_below=0), q, kv, monkeypatch)
    for head in range(2):
        for run, got in enumerate(found[head]):
            before = (START + 128 * run) // 64
            pooled = heads_of(q, head)[:, 128 * run : 128 * run + 128].mean(1)
            score = shares(pooled, k[head], before)
            forced = {0, before - 1}
            best = sorted(set(range(before)) - forced, key=lambda b: -float(score[b]))[:2]
            assert got == sorted([*forced, *best])


@pytest.mark.parametrize("tau", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_flex(seed: int, tau: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One head may read by the estimate and the other by columns and diagonals."""
    q, k, kv = sequence(seed)
    some = FlexPrefill(budget=192, dense_below=0, cell=256, gamma=0.5, tau=tau)
    calls = lists_of(some, q, kv, monkeypatch)
    assert len(calls) == 2
    for start, found in zip((START, START + 256), calls, strict=True):
        end = min(start + 256, END)
        for head in range(2):
            rows = heads_of(q, head)[:, start - START : end - START]
            assert found[head] == defined(rows, k[head, :end], start, some)


def defined(q: Tensor, k: Tensor, start: int, some: FlexPrefill) -> list[list[int]]:
    """The lists of a cell with queries q `[G, T, D]`, keys k `[end, D]`."""
    end, blocks = len(k), -(-len(k) // 64)
    runs = range(0, end - start, 128)
    estimates = torch.zeros(len(runs), blocks, dtype=torch.float64)
    for i, at in enumerate(runs):
        before = (start + at) // 64
        estimates[i, :before] = shares(q[:, at : at + 128].mean(1), k, before)
    rows = min(128, end - start)
    position = torch.arange(end - rows, end)
    score = q[:, -rows:].double() @ k.double().T * SIZE**-0.5
    share = score.masked_fill(torch.arange(end) > position[:, None], -torch.inf).softmax(-1).mean(0) / rows
    true, slashes = torch.zeros(2, blocks, dtype=torch.float64)
    for at in range(0, rows, 64):
        some_rows = share[at : at + 64]
        own = int(position[min(at + 63, rows - 1)]) // 64
        for b in range(blocks):
            mass = some_rows[:, 64 * b : 64 * b + 64].sum()
            true[b] += mass
            slashes[max(0, own - b)] += mass if own >= b else 0.0
    expected = shares(q[:, -rows:].mean(1), k, blocks)
    middle = (true + expected) / 2
    divergence = sum(0.5 * (p * (p / middle).log())[p > 0].sum() for p in (true, expected))
    pairs = leading(estimates.flatten(), some.gamma)
    columns, diagonals = leading(true, some.gamma), leading(slashes, some.gamma)
    lists = []
    for i, at in enumerate(runs):
        before = (start + at) // 64
        best = estimates[i].topk(min(some.budget // 64, blocks)).indices.tolist()
        if float(divergence) ** 0.5 < some.tau:
            read = {pair - i * blocks for pair in pairs if pair // blocks == i}
        else:
            read = columns | {before + step - d for step in (0, 1) for d in diagonals}
        read |= {0, before - 1, *best}
        lists.append(sorted(b for b in read if 0 <= b < before))
    return lists


def leading(shares: Tensor, gamma: float) -> set[int]:
    """The largest, until they hold `gamma` of all."""
    kept, held = set(), 0.0
    for index in shares.argsort(descending=True, stable=True).tolist():
        if held >= gamma * float(shares.sum()) or shares[index] <= 0:
            break
        kept.add(index)
        held += float(shares[index])
    return kept
