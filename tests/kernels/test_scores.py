"""Block scores: every implementation against the float64 reference, and the bound that they promise."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from drawn import implementations, relative
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentctx.kernels.records import BlockSummary
from agentctx.kernels.scores import block_scores, pool_queries

IMPLS = implementations("block_scores")
KINDS = ("minmax", "minmax on a GPU", "mean", "submeans", "hadamard2")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def summary_of(
    kind: str,
    *,
    batch: int = 1,
    kv_heads: int = 1,
    size: int = 64,
    page: int = 64,
    capacity: int = 16,
    dtype: torch.dtype = F32,
    generator: torch.Generator | None = None,
) -> BlockSummary:
    """A summary with random contents."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, kv_heads, *shape, generator=generator)

    if kind == "minmax":
        low, high = noise(size, capacity), noise(size, capacity)
        return BlockSummary(kind, torch.cat([low.maximum(high), low.minimum(high)], 2), page)
    if kind == "minmax on a GPU":
        low, high = noise(capacity, size), noise(capacity, size)
        data = torch.stack([low.maximum(high), low.minimum(high)], 3)
        return BlockSummary("minmax", data.to(dtype), page)
    if kind == "mean":
        return BlockSummary(kind, noise(capacity, size).to(dtype), page)
    if kind == "submeans":
        return BlockSummary(kind, noise(capacity * page // 16, size).to(dtype), page)
    codes = torch.randint(0, 256, (batch, kv_heads, capacity * page, size // 4), generator=generator)
    return BlockSummary(kind, codes.to(torch.uint8), page, torch.rand(kv_heads, generator=generator) + 0.5)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, BlockSummary, Tensor, dict[str, object]]:
    kind = draw(st.sampled_from(KINDS))
    sizes = (32, 64, 128, 256) if kind == "hadamard2" else (32, 64, 80, 96, 128, 100, 256)
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 8))
    rows, size, page = draw(st.integers(1, 4)), draw(st.sampled_from(sizes)), draw(st.sampled_from((16, 64)))
    capacity = draw(st.sampled_from((1, 3, 16, 32, 80)))
    if kind == "hadamard2":
        capacity = min(capacity, 16)
    dtype = draw(st.sampled_from((F32, BF16, F16)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    whole = capacity * page
    length = st.one_of(st.integers(0, whole), st.sampled_from((1, page - 1, page, whole - 1, whole)))
    lens = torch.tensor(draw(st.lists(length, min_size=batch, max_size=batch)), dtype=torch.int32)
    magnitude = draw(st.sampled_from((1.0, 1e-3, 1e3)))
    q = (torch.randn(batch, rows, kv_heads * group, size, generator=generator) * magnitude).to(dtype)
    options: dict[str, object] = {
        "group": draw(st.sampled_from(("max", "mean", "sum"))),
        "per_head": draw(st.booleans()),
        "scale": draw(st.sampled_from((None, 0.3, -1.0))),
    }
    if kind == "hadamard2":
        options["estimate"] = draw(st.sampled_from(("dot", "manhattan")))
    if draw(st.booleans()):
        options["q_pos"] = torch.randint(-2, whole + 2, (batch, rows), generator=generator).to(torch.int32)
    summary = summary_of(
        kind,
        batch=batch,
        kv_heads=kv_heads,
        size=size,
        page=page,
        capacity=capacity,
        dtype=dtype,
        generator=generator,
    )
    return q.transpose(1, 2), summary, lens, options  # heads lie apart


def uncovered(impl: str, q: Tensor, summary: BlockSummary) -> bool:
    """Whether the C++ scorer leaves this to torch, by its own documentation."""
    data = summary.data
    fits = data.dim() == 4 and data.shape[3] % 16 == 0 if summary.kind == "minmax" else q.shape[3] % 16 == 0
    return impl.startswith("cpp") and (not fits or F16 in (q.dtype, data.dtype))


def assert_scores(got: Tensor, want: Tensor, exact: bool) -> None:
    assert got.shape == want.shape and got.dtype == F32
    assert torch.equal(got.isinf(), want.isinf())
    seen = ~want.isinf()
    if exact:
        assert torch.equal(got, want)
    elif bool(seen.any()):
        assert relative(got[seen], want[seen]) <= 1e-6


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems())
def test_scores_are_those_of_the_definition(
    impl: str, problem: tuple[Tensor, BlockSummary, Tensor, dict[str, object]]
) -> None:
    q, summary, lens, options = problem
    chosen = None if uncovered(impl, q, summary) else impl
    got = block_scores(q, summary, lens, impl=chosen, validate=True, **options)
    want = block_scores(q, summary, lens, impl="reference", **options)
    whole = options.get("estimate") == "manhattan" and (options["group"] != "mean" or options["per_head"])
    assert_scores(got, want, bool(whole))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    size=st.sampled_from((32, 80, 128)),
    group=st.integers(1, 5),
    tokens=st.integers(1, 400),
    seed=st.integers(0, 99),
)
@example(size=64, group=3, tokens=1, seed=0)
def test_minmax_bounds_every_score_of_its_block(size: int, group: int, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    page, capacity = 64, 16
    k = torch.randn(1, 2, tokens, size, generator=generator)
    q = torch.randn(1, 2 * group, 2, size, generator=generator)
    data = torch.zeros(1, 2, 2 * size, capacity)
    for block, run in enumerate(k.split(page, 2)):
        data[..., block] = torch.cat([run.amax(2), run.amin(2)], -1)
    lens = torch.tensor([tokens], dtype=torch.int32)
    true = (q @ k.repeat_interleave(group, 1).transpose(2, 3)) * size**-0.5
    for impl in (name for name in IMPLS if name != "triton"):  # which has another layout, and a GPU
        bound = block_scores(q, BlockSummary("minmax", data, page), lens, per_head=True, impl=impl)
        over = bound.repeat_interleave(page, -1)[..., :tokens]
        assert bool((over >= true - 1e-5 * true.abs().clamp_min(1)).all())


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_the_manhattan_estimate_is_the_distance_of_codes(impl: str) -> None:
    q = torch.zeros(1, 1, 1, 32)
    q[..., 0] = 1.0  # its rotation is constant, so every channel is above 0.98 of the root mean square
    data = torch.zeros(1, 1, 64, 8, dtype=torch.uint8)
    data[..., 1, :] = 0xFF
    data[..., 1, 3] = 0b10_11_11_11  # one channel a cell lower
    summary = BlockSummary("hadamard2", data, 16, torch.ones(1))
    lens = torch.tensor([40], dtype=torch.int32)
    scores = block_scores(q, summary, lens, estimate="manhattan", impl=impl)
    assert scores.flatten().tolist() == [-1.0, -96.0, -96.0, float("-inf")]


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_the_dot_estimate_takes_the_means_of_the_cells(impl: str) -> None:
    q = torch.zeros(1, 1, 1, 64)
    q[..., 0] = 8.0  # rotates to ones
    data = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    data[..., 2, 5] = 0b11_10_01_00
    summary = BlockSummary("hadamard2", data, 16, torch.tensor([0.98 * 2]))
    lens = torch.tensor([3], dtype=torch.int32)
    got = block_scores(q, summary, lens, scale=1.0, impl=impl)
    assert float(got) == pytest.approx(-1.510 * 2 * 60, rel=1e-6)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_a_run_that_starts_in_the_block_before_counts(impl: str) -> None:
    q = torch.ones(1, 1, 1, 16)
    data = torch.zeros(1, 1, 64, 16)
    data[0, 0, 3] = 1.0  # tokens 48 to 79: blocks 0 and 1
    data[0, 0, 9] = 5.0  # starts at token 144, past the context
    summary = BlockSummary("submeans", data, 64)
    lens = torch.tensor([144], dtype=torch.int32)
    scores = block_scores(q, summary, lens, scale=1.0, impl=impl)[0, 0, 0]
    assert scores[:4].tolist() == [16.0, 16.0, 0.0, float("-inf")]


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("kind", ["minmax", "mean"])
def test_a_nan_query_is_not_hidden(impl: str, kind: str) -> None:
    q = torch.randn(1, 3, 2, 64, generator=torch.Generator().manual_seed(1))
    q[0, 1, 0, 5] = float("nan")
    lens = torch.tensor([100], dtype=torch.int32)
    summary = summary_of(kind, generator=torch.Generator().manual_seed(2))
    scores = block_scores(q, summary, lens, impl=impl)
    assert bool(scores[0, 0, 0, :2].isnan().all()) and not bool(scores[0, 0, 1].isnan().any())
    with pytest.raises(IndexError, match="q"):
        block_scores(q, summary, lens, impl=impl, validate=True)


@pytest.mark.parametrize("impl", implementations("pool_queries"))
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 70),
    block_q=st.sampled_from((1, 7, 16, 128)),
    dtype=st.sampled_from((F32, BF16)),
    size=st.sampled_from((32, 50)),
)
def test_pooled_queries_are_means(impl: str, rows: int, block_q: int, dtype: torch.dtype, size: int) -> None:
    q = torch.randn(2, rows, 3, size, generator=torch.Generator().manual_seed(rows)).to(dtype).transpose(1, 2)
    got, want = pool_queries(q, block_q, impl=impl), pool_queries(q, block_q, impl="reference")
    assert got.shape == want.shape and got.dtype == F32
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", ["minmax", "mean", "submeans", "hadamard2"])
def test_two_threads_give_the_scores_of_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentctx.kernels.threads.worth", lambda *_: torch.get_num_threads())
    generator = torch.Generator().manual_seed(3)
    capacity = 64 if kind == "hadamard2" else 1088  # more than two shares of a head
    summary = summary_of(kind, kv_heads=2, capacity=capacity, generator=generator)
    q = torch.randn(1, 6, 3, 64, generator=generator)
    lens = torch.tensor([capacity * 64 - 5], dtype=torch.int32)
    for impl in (name for name in IMPLS if name.startswith("cpp")):
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(block_scores(q, summary, lens, impl=impl))
        assert torch.equal(*found)


def test_bad_input_is_named() -> None:
    q, lens = torch.randn(1, 6, 1, 64), torch.tensor([100], dtype=torch.int32)
    summary = summary_of("minmax", kv_heads=2)
    codes = summary_of("hadamard2", kv_heads=2)

    def refused(match: str, *args: object, **options: object) -> None:
        with pytest.raises((ValueError, TypeError), match=match):
            block_scores(*args, **options)

    refused("q is list", [1.0], summary, lens)
    refused("q is torch.int32", q.int(), summary, lens)
    refused("contiguous", q.transpose(1, 3), summary, lens)
    refused("5 heads", q[:, :5], summary, lens)
    refused("summary is Tensor", q, summary.data, lens)
    refused("no minmax summary", q[..., :32].contiguous(), summary, lens)
    refused("no minmax summary", q, BlockSummary("minmax", summary.data.bfloat16(), 64), lens)
    refused("vmax", q, BlockSummary("vmax", torch.zeros(1, 2, 16), 64), lens)
    refused("vmax", q, BlockSummary("vmax", torch.zeros(1, 2, 16, 1), 64), lens)
    refused("power of two", torch.randn(1, 6, 1, 96), codes, lens)
    refused("summary.scale", q, BlockSummary("hadamard2", codes.data, 64), lens)
    refused("context_lens", q, summary, lens.long())
    refused("context_lens", q, summary, lens.repeat(2))
    refused("q_pos", q, summary, lens, q_pos=torch.zeros(1, 2, dtype=torch.int32))
    refused("group", q, summary, lens, group="min")
    refused("estimate", q, summary, lens, estimate="manhattan")
    refused("estimate", q, codes, lens, estimate="exact")
    with pytest.raises(ValueError, match="block_q"):
        pool_queries(q, 0)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("tokens", [-1, 16 * 64 + 1])
def test_a_context_beyond_the_summary_is_refused(impl: str, tokens: int) -> None:
    lens = torch.tensor([tokens], dtype=torch.int32)
    with pytest.raises(IndexError, match="context_lens"):
        block_scores(torch.randn(1, 1, 1, 64), summary_of("minmax"), lens, impl=impl)
