"""What each method reads, against its definition in float64; and the bracket of what it leaves out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentctx.kernels.records import BlockSelection
from agentctx.memory.kv.pool import KVShape, PagePool
from agentctx.memory.kv.table import BlockTable
from agentctx.runtime.guard import bracket, limit_of
from agentctx.runtime.layer import LayerKV, Scoring
from agentctx.runtime.methods.blocks import BestBlocks
from agentctx.runtime.methods.ladder import Ladder
from agentctx.runtime.methods.lminfinite import Lambda
from agentctx.runtime.methods.selfextend import SelfExtend
from agentctx.runtime.methods.streaming import Streaming
from agentctx.runtime.methods.table import method
from agentctx.runtime.methods.triangle import Triangle
from agentctx.runtime.notes import Notes
from agentctx.runtime.rotation import Rotation

SIZE = 32
STEPS = 1.0 / 10000.0 ** (torch.arange(0, SIZE, 2).float() / SIZE)


def layer(k: Tensor, v: Tensor, *, softcap: float = 0.0, index: int = 2) -> LayerKV:
    """Keys and values `[Hkv, N, D]` of one sequence, in pages."""
    heads, tokens, size = k.shape
    pool = PagePool(KVShape(1, heads, size, k.dtype), budget=1 << 22)
    table = BlockTable(pool)
    table.reserve(tokens)
    for at, page in enumerate(table.pages):
        some = slice(64 * at, min(64 * at + 64, tokens))
        pool.write(page, k[None, :, some], v[None, :, some])
    table.tokens = tokens
    scoring = Scoring(size**-0.5, softcap, rotation=Rotation(STEPS))
    lens = torch.tensor([tokens], dtype=torch.int32)
    return LayerKV(index, pool.layers[0], table.ids[None], lens, tokens, scoring, False, [Notes()], layers=3)


def drawn(seed: int, *, tokens: int, rows: int, group: int, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """q `[1, Hq, T, D]`, k and v `[Hkv, N, D]`; keys have a common part, as those of models do."""
    chance = torch.Generator().manual_seed(seed)
    q = torch.randn(1, heads * group, rows, SIZE, generator=chance) * 2
    k, v = torch.randn(2, heads, tokens, SIZE, generator=chance).unbind(0)
    return q, k + torch.randn(heads, 1, SIZE, generator=chance), v


def expected_lists(scores: Tensor, position: int, budget: int) -> list[int]:
    """First block, the last five (the own included), and the best of `scores [NB]`; of equals the newer."""
    blocks = position // 64 + 1
    forced = {0, *range(max(0, blocks - 5), blocks)}
    rest = sorted((b for b in range(blocks) if b not in forced), key=lambda b: (-float(scores[b]), -b))
    return sorted([*forced, *rest[: budget // 64 - len(forced)]])


def defined_scores(name: str, q: Tensor, k: Tensor, position: int) -> Tensor:
    """Scores `[Hkv, NB]` of one row q `[Hkv, G, D]` in float64, over the keys up to its position."""
    q, k = q.double() * SIZE**-0.5, k[:, : position + 1].double()
    found = []
    for start in range(0, k.shape[1], 64):
        block = k[:, start : start + 64]
        if name == "adamas":
            found.append(torch.einsum("hgd,hnd->hgn", hadamard(q), coded(block, k)).amax((1, 2)))
        elif name == "quest":
            high, low = block.amax(1)[:, None], block.amin(1)[:, None]
            found.append(torch.maximum(q * high, q * low).sum(-1).amax(1))
        else:
            runs = [k[:, at : at + 32] for at in range(max(0, start - 16), min(start + 64, k.shape[1]), 16)]
            means = torch.stack([run.mean(1) for run in runs], 1)
            found.append(torch.einsum("hgd,hrd->hgr", q, means).amax(-1))
    scores = torch.stack(found, -1)
    return scores.softmax(-1).sum(1) if name == "mean" else scores


def hadamard(x: Tensor) -> Tensor:
    """x `[..., D]` times the orthonormal matrix of Hadamard and Sylvester."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < x.shape[-1]:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) * 0.5**0.5
    return x @ matrix


def coded(block: Tensor, k: Tensor) -> Tensor:
    """Rotated keys `[Hkv, n, D]` in two bits, cut by the spread of the first 512 tokens."""
    spread = hadamard(k[:, :512]).flatten(1).std(1, correction=0)[:, None, None]
    x = hadamard(block) / spread
    return torch.where(x.abs() > 0.98, 1.510, 0.4528) * torch.where(x > 0, 1.0, -1.0) * spread


@pytest.mark.parametrize("name", ["quest", "mean", "adamas"])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 3])
def test_selection_is_as_defined(name: str, group: int, rows: int) -> None:
    q, k, v = drawn(group, tokens=1170, rows=rows, group=group)
    kv = layer(k, v)
    some = method(f"{name}:budget=512,dense_below=0")
    assert isinstance(some, BestBlocks)
    chosen = some.choose(q, kv)
    for row in range(rows):
        position = 1170 - rows + row
        scores = defined_scores(name, q[0, :, row].view(2, group, SIZE), k, position)
        for head in range(2):
            count = int(chosen.counts[0, head, row])
            got = chosen.blocks[0, head, row, :count].tolist()
            assert got == expected_lists(scores[head], position, 512)


@pytest.mark.parametrize("name", ["quest", "mean", "adamas", "random"])
@settings(deadline=None, derandomize=True, max_examples=10)
@given(seed=st.integers(0, 99), tokens=st.integers(600, 1300), rows=st.integers(1, 20))
def test_what_must_be_read_is_read(name: str, seed: int, tokens: int, rows: int) -> None:
    """First block, last four and the row's own; and attention is exactly that over the lists."""
    q, k, v = drawn(seed, tokens=tokens, rows=rows, group=2)
    some = method(f"{name}:budget=512,dense_below=0")
    assert isinstance(some, BestBlocks)
    kv = layer(k, v)
    chosen = some.choose(q, kv)
    found = some.part(q, kv)
    for row in range(rows):
        own = (tokens - rows + row) // 64
        for head in range(2):
            count = int(chosen.counts[0, head, row])
            got = chosen.blocks[0, head, row, :count].tolist()
            assert count == min(8, own + 1) and {0, *range(own - 4, own + 1)} <= set(got)
            seen = torch.cat([torch.arange(64 * b, 64 * b + 64) for b in got])
            seen = seen[seen <= tokens - rows + row]
            exact = attended(q[0, 2 * head : 2 * head + 2, row], k[head, seen], v[head, seen])
            torch.testing.assert_close(
                found.out[0, 2 * head : 2 * head + 2, row].double(), exact, atol=1e-5, rtol=0
            )


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of rows q `[n, D]` to keys `[m, D]`, or to keys of their own `[n, m, D]`, in float64."""
    score = torch.einsum("nd,...md->nm" if k.dim() == 2 else "nd,nmd->nm", q.double(), k.double())
    return (score * SIZE**-0.5).softmax(-1) @ v.double()


def turned(x: Tensor, at: Tensor) -> Tensor:
    """x `[..., T, D]` turned to positions `at [T]`, in float64."""
    angle = at.double()[:, None] * STEPS.double()
    a, b = x.double().chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("some", [Streaming(window=252), Lambda(window=200)])
def test_positions_are_moved_as_defined(some: Streaming, rows: int) -> None:
    """Against unturned keys that are turned to where the paper puts them, for every row anew."""
    tokens, sinks, window = 700, some.sinks, some.window
    q, k, v = drawn(rows, tokens=tokens, rows=rows, group=2)
    places = torch.arange(tokens)
    found = some.part(turned(q, places[-rows:]).float(), layer(turned(k, places).float(), v))
    for row in range(rows):
        position = tokens - rows + row
        kept = torch.cat([places[:sinks], places[position - window + 1 : position + 1]])
        if isinstance(some, Lambda):  # true distances, the first tokens at that of the window
            stands, own = torch.cat([torch.full((sinks,), position - window), kept[sinks:]]), position
        else:  # positions as if the kept tokens were all
            stands, own = torch.arange(sinks + window), sinks + window - 1
        for head in range(4):
            query = turned(q[0, head, row][None], torch.tensor([own]))
            exact = attended(query, turned(k[head // 2, kept], stands), v[head // 2, kept])
            torch.testing.assert_close(found.out[0, head, row].double(), exact[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize(("group", "window"), [(4, 130), (7, 200), (3, 128)])
def test_far_tokens_stand_in_groups(rows: int, group: int, window: int) -> None:
    tokens = 700
    q, k, v = drawn(rows, tokens=tokens, rows=rows, group=2)
    places = torch.arange(tokens)
    some = SelfExtend(group=group, window=window)
    found = some.part(turned(q, places[-rows:]).float(), layer(turned(k, places).float(), v))
    for row in range(rows):
        position = tokens - rows + row
        seen = places[: position + 1]
        grouped = position // group + window - window // group - seen // group
        distance = torch.where(position - seen < window, position - seen, grouped)
        for head in range(4):
            keys = turned(k[head // 2, seen], -distance)
            exact = attended(q[0, head, row][None], keys, v[head // 2, seen])
            torch.testing.assert_close(found.out[0, head, row].double(), exact[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("rows", [1, 40, 300])
@pytest.mark.parametrize(
    ("index", "kept"),  # of a ladder of three columns of two tokens over six layers
    [(0, (0, 1)), (2, (0, 1, 2, 3)), (4, (2, 3, 4, 5)), (5, (4, 5))],
)
def test_a_ladder_thins_what_is_old(rows: int, index: int, kept: tuple[int, ...]) -> None:
    """Against a cache that is filled token by token."""
    tokens, budget, sinks, recent = 700, 256, 4, 64
    q, k, v = drawn(rows, tokens=tokens, rows=rows, group=2)
    some = Ladder(budget=budget, span=3, overlap=1, width=2, recent=recent)
    places = torch.arange(tokens)
    kv = replace(layer(turned(k, places).float(), v, index=index), layers=6)
    found = some.part(turned(q, places[-rows:]).float(), kv)
    cache: list[int] = []
    for position in range(tokens):
        if len(cache) == budget:
            middle = cache[sinks : budget - recent]
            thinned = [token for at, token in enumerate(middle) if at % 6 in kept]
            cache = cache[:sinks] + thinned + cache[budget - recent :]
        cache.append(position)
        row = position - (tokens - rows)
        if row < 0 or row % 19:
            continue
        stands = torch.arange(len(cache))
        for head in range(4):
            query = turned(q[0, head, row][None], stands[-1:])
            exact = attended(query, turned(k[head // 2, cache], stands), v[head // 2, cache])
            torch.testing.assert_close(found.out[0, head, row].double(), exact[0], atol=1e-4, rtol=0)


def test_triangle_sees_the_beginning_and_the_neighbourhood() -> None:
    q, k, v = drawn(0, tokens=500, rows=30, group=2)
    found = Triangle(local=100, dense_below=0).part(q, layer(k, v))
    for row in range(30):
        position = 470 + row
        seen = torch.cat([torch.arange(8), torch.arange(position - 99, position + 1)])
        for head in range(4):
            exact = attended(q[0, head, row][None], k[head // 2, seen], v[head // 2, seen])
            torch.testing.assert_close(found.out[0, head, row].double(), exact[0], atol=1e-5, rtol=0)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    seed=st.integers(0, 999),
    tokens=st.integers(450, 1000),
    rows=st.integers(1, 9),
    softcap=st.sampled_from([0.0, 5.0, 30.0]),
    heat=st.sampled_from([0.1, 1.0, 4.0]),
)
def test_the_bracket_holds_what_was_dropped(
    seed: int, tokens: int, rows: int, softcap: float, heat: float
) -> None:
    q, k, v = drawn(seed, tokens=tokens, rows=rows, group=2)
    contained(q * heat, layer(k, v, softcap=softcap), k)


def contained(q: Tensor, kv: LayerKV, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Assert that the exact dropped share of quest's choice is bracketed; returns low, exact and high."""
    some = method("quest:budget=448,dense_below=0")
    assert isinstance(some, BestBlocks)
    chosen, found = some.choose(q, kv), some.part(q, kv)
    low, high = bracket(q, kv, chosen, found.lse)
    exact = dropped_share(q, k, kv.scoring, chosen)
    assert bool((low <= exact + 1e-5).all()) and bool((exact <= high + 1e-5).all())
    return low, exact, high


def dropped_share(q: Tensor, k: Tensor, scoring: Scoring, chosen: BlockSelection) -> Tensor:
    """The attention to blocks that are not listed, `[1, Hq, T]`, in float64."""
    group, rows, tokens = q.shape[1] // k.shape[0], q.shape[2], k.shape[1]
    score = q[0].double() @ k.double().repeat_interleave(group, 0).transpose(1, 2) * scoring.scale
    if scoring.softcap:
        score = scoring.softcap * torch.tanh(score / scoring.softcap)
    position = torch.arange(tokens - rows, tokens)[:, None]
    share = score.masked_fill(torch.arange(tokens) > position, -math.inf).softmax(-1)
    blocks = torch.arange(tokens) // 64
    live = torch.arange(chosen.blocks.shape[-1]) < chosen.counts[0, ..., None]
    listed = torch.where(live, chosen.blocks[0], -1)
    kept = (listed[..., None, :] == blocks[:, None]).any(-1).repeat_interleave(group, 0)
    return share.masked_fill(kept, 0.0).sum(-1)[None]


def test_a_guard_reports_and_falls_back() -> None:
    q, k, v = drawn(1, tokens=1000, rows=2, group=2)
    exact = layer(k, v).exact(q)
    for guard, falls in (("report", False), ("certified:0.001", True)):
        kv = layer(k, v)
        found = method(f"quest:budget=448,dense_below=0,guard={guard}").attend(q, kv)
        coverage = kv.notes[0].coverage
        assert coverage.rows == 8 and 0 < coverage.low < coverage.high <= 8 * coverage.worst <= 8
        assert coverage.fallbacks == (8 if falls else 0)
        assert torch.allclose(found.out, exact.out) == falls
    assert limit_of("certified:0.25") == 0.25
