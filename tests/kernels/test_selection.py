"""Selection: every implementation against a plain sort, and the rules that a list keeps."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from drawn import UNUSED, implementations
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentctx.kernels import validate
from agentctx.kernels.records import BlockSelection, BlockSummary
from agentctx.kernels.scores import block_scores
from agentctx.kernels.selection import resolve_pages, select_blocks, topk_blocks, topp_blocks

IMPLS = implementations("topk_blocks")
ALL = ["reference", *IMPLS]
INF, NAN = math.inf, math.nan


@st.composite
def scored(draw: st.DrawFn) -> tuple[Tensor, int | Tensor]:
    """Scores `[B, H, (M,) NB]` with ties, infinities, zeros of both signs and NaN, and a number of blocks."""
    batch, heads, queries = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 3))
    width = draw(st.one_of(st.integers(0, 40), st.sampled_from((64, 200, 1000, 2048))))
    lead = (batch, heads, queries) if queries else (batch, heads)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scores = torch.randn(*lead, width, generator=generator) * 3
    if draw(st.booleans()):
        scores = scores.round() * 0.0 + scores.round()  # many ties; zeros of both signs
    odd = draw(st.lists(st.sampled_from((INF, -INF, NAN, 0.0, -0.0, 1e38, -1e38, 1e-45)), max_size=8))
    for value in odd:
        at = torch.rand(scores.shape, generator=generator) < 0.1
        scores[at] = value
    kind = draw(st.sampled_from(("int", "batch", "query") if queries else ("int", "batch")))
    if kind == "int":
        return scores, draw(st.integers(0, width))
    shape = (batch,) if kind == "batch" else (batch, queries)
    return scores, torch.randint(0, width + 1, shape, generator=generator, dtype=torch.int32)


def used(scores: Tensor, n_blocks: int | Tensor) -> Tensor:
    """The number of blocks of every list."""
    if isinstance(n_blocks, int):
        return torch.full(scores.shape[:-1], n_blocks)
    if n_blocks.dim() == 2:
        return n_blocks[:, None].expand(scores.shape[:-1])
    return n_blocks.view(-1, *[1] * (scores.dim() - 2)).expand(scores.shape[:-1])


def assert_lists(blocks: Tensor, counts: Tensor, n: Tensor) -> None:
    """Ascending, unique, below n, and 0 in unused slots."""
    assert blocks.dtype == counts.dtype == torch.int32
    validate.selection(BlockSelection(blocks, blocks, counts), 2**31 - 1, n)
    past = torch.arange(blocks.shape[-1]) >= counts.unsqueeze(-1)
    assert not bool(blocks[past].any())


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    case=scored(),
    k=st.sampled_from((1, 2, 3, 5, 16, 40, 100)),
    sink=st.integers(0, 3),
    local=st.integers(0, 4),
)
def test_the_k_best_are_those_of_a_sort(
    impl: str, case: tuple[Tensor, int | Tensor], k: int, sink: int, local: int
) -> None:
    scores, n_blocks = case
    options = {"sink_blocks": sink, "local_blocks": local}
    blocks, counts = topk_blocks(scores, n_blocks, k, impl=impl, **options)
    want = topk_blocks(scores, n_blocks, k, impl="reference", **options)
    assert torch.equal(blocks, want[0]) and torch.equal(counts, want[1])
    n = used(scores, n_blocks)
    assert blocks.shape == (*scores.shape[:-1], k)
    assert torch.equal(counts, n.clamp_max(k).int())
    assert_lists(blocks, counts, n)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    case=scored(),
    p=st.one_of(st.sampled_from((1e-6, 0.5, 0.9, 1.0)), st.floats(0.01, 1)),
    k_min=st.integers(0, 6),
    more=st.sampled_from((0, 1, 8, 2048)),
    sink=st.integers(0, 2),
    local=st.integers(0, 3),
)
def test_top_p_is_that_of_a_sort(
    impl: str, case: tuple[Tensor, int | Tensor], p: float, k_min: int, more: int, sink: int, local: int
) -> None:
    scores, n_blocks = case
    options = {"k_min": k_min, "k_max": max(1, k_min + more), "sink_blocks": sink, "local_blocks": local}
    blocks, counts = topp_blocks(scores, n_blocks, p, impl=impl, **options)
    want = topp_blocks(scores, n_blocks, p, impl="reference", **options)
    assert torch.equal(counts, want[1]) and torch.equal(blocks, want[0])
    n = used(scores, n_blocks)
    assert_lists(blocks, counts, n)
    assert bool((counts >= n.clamp_max(k_min)).all())
    if p == 1:
        assert torch.equal(counts, n.clamp_max(options["k_max"]).int())


@pytest.mark.parametrize("impl", ALL)
def test_rules_of_ranking(impl: str) -> None:
    def chosen(row: list[float], k: int, sink: int = 0, local: int = 0) -> list[int]:
        scores = torch.tensor([[row]], dtype=torch.float32)
        blocks, counts = topk_blocks(scores, len(row), k, sink_blocks=sink, local_blocks=local, impl=impl)
        return blocks[0, 0, : int(counts)].tolist()

    assert chosen([1, 3, 2, 0], 2) == [1, 2]
    assert chosen([5, 5, 5, 5], 2) == [2, 3]  # of equals the newer
    assert chosen([0.0, -0.0, -1], 1) == [1] and chosen([-0.0, 0.0, -1], 1) == [1]
    assert chosen([NAN, -1e38, NAN, -2], 2) == [1, 3]
    assert chosen([-INF, NAN, -INF], 1) == [2] and chosen([NAN, -INF, NAN], 1) == [2]
    assert chosen([NAN, INF, 0], 1) == [1]
    assert chosen([0, 9, 9, 9, 0, 0], 4, sink=1, local=2) == [0, 3, 4, 5]
    assert chosen([9, 9, 9, 0], 2, sink=1, local=2) == [2, 3]  # too few slots: the newest
    assert chosen([1, 2], 5, sink=3, local=3) == [0, 1]


@pytest.mark.parametrize("impl", ALL)
def test_top_p_counts_what_is_forced(impl: str) -> None:
    # Masses 1/2, 1/4, 1/8, 1/8.
    scores = torch.tensor([[[0.5, 0.25, 0.125, 0.125]]]).log()

    def chosen(p: float, **options: int) -> list[int]:
        own = {"k_min": 1, "k_max": 4, "sink_blocks": 0, "local_blocks": 0, **options}
        blocks, counts = topp_blocks(scores, 4, p, impl=impl, **own)
        return blocks[0, 0, : int(counts)].tolist()

    assert chosen(0.4) == [0] and chosen(0.6) == [0, 1] and chosen(0.8) == [0, 1, 3]
    assert chosen(0.1, k_min=2) == [0, 1] and chosen(0.99, k_max=2) == [0, 1]
    assert chosen(0.2, local_blocks=2) == [2, 3]
    assert chosen(0.6, local_blocks=1) == [0, 3]
    assert chosen(1.0) == [0, 1, 2, 3]


@pytest.mark.parametrize("impl", ALL)
def test_pages_are_looked_up(impl: str) -> None:
    table = torch.tensor([[7, 5, 3], [2, 4, 6]], dtype=torch.int32)
    blocks = torch.tensor([[[0, 2]], [[1, UNUSED]]], dtype=torch.int32)
    counts = torch.tensor([[2], [1]], dtype=torch.int32)
    found = resolve_pages(blocks, counts, table, impl=impl, validate=True)
    assert found.pages.tolist() == [[[7, 3]], [[4, 0]]]
    assert torch.equal(found.blocks, blocks) and torch.equal(found.counts, counts)
    many = resolve_pages(blocks[:, :, None], counts[:, :, None], table, impl=impl)
    assert many.pages.tolist() == [[[[7, 3]]], [[[4, 0]]]]
    none = resolve_pages(blocks, counts * 0, table[:, :0], impl=impl)
    assert not bool(none.pages.any())


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize(("block", "count"), [(3, 1), (-1, 1), (2**31 - 1, 1), (0, 3), (0, -1)])
def test_a_list_outside_the_table_is_refused(impl: str, block: int, count: int) -> None:
    table = torch.zeros(1, 3, dtype=torch.int32)
    blocks = torch.tensor([[[block, 0]]], dtype=torch.int32)
    with pytest.raises(IndexError, match="blocks|counts"):
        resolve_pages(blocks, torch.tensor([[count]], dtype=torch.int32), table, impl=impl)


def summary_of(kind: str, batch: int, heads: int, capacity: int, generator: torch.Generator) -> BlockSummary:
    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, heads, *shape, generator=generator)

    if kind == "minmax":
        a, b = noise(64, capacity), noise(64, capacity)
        return BlockSummary(kind, torch.cat([a.maximum(b), a.minimum(b)], 2), 64)
    if kind == "mean":
        return BlockSummary(kind, noise(capacity, 64).bfloat16(), 64)
    if kind == "submeans":
        return BlockSummary(kind, noise(4 * capacity, 64), 64)
    codes = torch.randint(0, 256, (batch, heads, 64 * capacity, 16), generator=generator).to(torch.uint8)
    return BlockSummary(kind, codes, 64, torch.ones(heads))


@pytest.mark.parametrize("impl", implementations("select_blocks"))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(("minmax", "minmax", "mean", "submeans", "hadamard2")),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    group=st.integers(1, 8),
    rows=st.integers(1, 3),
    capacity=st.sampled_from((16, 48, 128)),
    k=st.sampled_from((1, 4, 16, 60)),
    reduce=st.sampled_from(("max", "mean", "sum")),
    seed=st.integers(0, 2**16),
)
def test_one_call_equals_its_parts(
    impl: str,
    kind: str,
    batch: int,
    heads: int,
    group: int,
    rows: int,
    capacity: int,
    k: int,
    reduce: str,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    summary = summary_of(kind, batch, heads, min(capacity, 16 if kind == "hadamard2" else 128), generator)
    held = min(capacity, 16 if kind == "hadamard2" else 128)
    q = torch.randn(batch, heads * group, rows, 64, generator=generator).bfloat16()
    lens = torch.randint(0, 64 * held + 1, (batch,), generator=generator, dtype=torch.int32)
    table = torch.randperm(batch * held, generator=generator).view(batch, held).int()
    got = select_blocks(q, summary, table, lens, k, group=reduce, impl=impl, validate=True)
    scores = block_scores(q, summary, lens, group=reduce, impl=impl).amax(2)
    want = resolve_pages(*topk_blocks(scores, (lens + 63) // 64, k, impl=impl), table, impl=impl)
    for mine, other in zip(got, want, strict=True):
        assert mine.dtype == torch.int32 and torch.equal(mine, other)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_two_threads_give_the_lists_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentctx.kernels.threads.worth", lambda *_: torch.get_num_threads())
    generator = torch.Generator().manual_seed(5)
    scores = torch.randn(2, 3, 5, 700, generator=generator)
    summary = summary_of("minmax", 2, 3, 128, generator)
    q = torch.randn(2, 9, 1, 64, generator=generator)
    table, lens = torch.arange(256, dtype=torch.int32).view(2, 128), torch.tensor([8000, 77]).int()
    for impl in (name for name in IMPLS if name.startswith("cpp")):
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            lists = topk_blocks(scores, 650, 20, impl=impl)
            shares = topp_blocks(scores, 650, 0.7, k_min=3, k_max=300, impl=impl)
            found.append((*lists, *shares, *select_blocks(q, summary, table, lens, 16, impl=impl)))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("impl", ALL)
def test_bad_contents_are_refused(impl: str) -> None:
    scores = torch.randn(1, 2, 8)
    for wrong in (9, -1):
        with pytest.raises(IndexError, match="n_blocks"):
            topk_blocks(scores, torch.tensor([wrong], dtype=torch.int32), 2, impl=impl)
        with pytest.raises(IndexError, match="n_blocks"):
            topp_blocks(scores, wrong, 0.5, k_min=1, k_max=2, impl=impl)
    scores[0, 1, 3] = NAN
    with pytest.raises(IndexError, match=r"scores\[0, 1, 3\] is NaN"):
        topk_blocks(scores, 8, 2, impl=impl, validate=True)
    summary = summary_of("minmax", 1, 1, 16, torch.Generator().manual_seed(0))
    q, table = torch.randn(1, 1, 1, 64), torch.zeros(1, 4, dtype=torch.int32)
    with pytest.raises(IndexError):  # the table is shorter than the context
        select_blocks(q, summary, table, torch.tensor([400]).int(), 8, impl=impl)
    with pytest.raises(IndexError):  # the summary is
        select_blocks(q, summary, table, torch.tensor([4000]).int(), 8, impl=impl)


def test_bad_input_is_named() -> None:
    scores = torch.randn(1, 2, 3, 8)
    two = torch.tensor([8, 8], dtype=torch.int32)
    for match, call in (
        ("scores is list", lambda: topk_blocks([1.0], 1, 1)),
        ("scores is torch.float64", lambda: topk_blocks(scores.double(), 8, 2)),
        (r"scores is \[2, 3, 8\]|n_blocks", lambda: topk_blocks(scores[0], two[:, None], 2)),
        (r"scores is \[8\]", lambda: topk_blocks(scores[0, 0, 0], 8, 2)),
        ("n_blocks", lambda: topk_blocks(scores, two, 2)),
        ("n_blocks", lambda: topk_blocks(scores, two[:1].long(), 2)),
        ("k is 0", lambda: topk_blocks(scores, 8, 0)),
        ("sink_blocks", lambda: topk_blocks(scores, 8, 2, sink_blocks=-1)),
        ("p is 0", lambda: topp_blocks(scores, 8, 0.0, k_min=1, k_max=2)),
        ("p is 1.5", lambda: topp_blocks(scores, 8, 1.5, k_min=1, k_max=2)),
        ("p is nan", lambda: topp_blocks(scores, 8, NAN, k_min=1, k_max=2)),
        ("k_min is 3", lambda: topp_blocks(scores, 8, 0.5, k_min=3, k_max=2)),
        ("blocks is int", lambda: resolve_pages(1, two, two)),
        ("counts", lambda: resolve_pages(two.view(1, 1, 2), two, two[None])),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            call()
