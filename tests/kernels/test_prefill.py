"""Prefill: every implementation against the float64 reference, and what must hold between the operations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import drawn
import pytest
import torch
from drawn_lists import assert_close, lists_for, with_own_block
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentctx.kernels.prefill import (
    block_sparse_prefill,
    dense_prefill,
    token_sparse_prefill,
    window_prefill,
)
from agentctx.kernels.records import Attention, KVPages

IMPLS = drawn.implementations("block_sparse_prefill")
TOKEN_IMPLS = drawn.implementations("token_sparse_prefill")
# Only `validate` keeps a GPU from pages that the pool does not have.
CHECKED = [name for name in IMPLS if name != "triton"]
PRECISE: dict[str, Any] = {"impl": "reference", "out_dtype": torch.float32, "validate": True}


@st.composite
def problems(draw: st.DrawFn) -> tuple[drawn.Case, Tensor, dict[str, Any]]:
    """A case, the position of its first row, and options."""
    formats = ("paged", "packed", "int8", "int4")
    case = draw(drawn.cases(formats=formats, max_rows=draw(st.sampled_from((4, 70, 140)))))
    drift = draw(st.sampled_from((0, 0, -1, -37, 5, -400)))
    offset = case.lens - case.q.shape[2] + drift
    return case, offset, {"softcap": draw(st.sampled_from((0.0, 0.0, 20.0)))}


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    problem=problems(),
    block_q=st.sampled_from((64, 128)),
    density=st.sampled_from((0.0, 0.4, 1.0)),
    per_head=st.booleans(),
)
def test_block_sparse_agrees(
    impl: str, problem: tuple[drawn.Case, Tensor, Any], block_q: int, density: float, per_head: bool
) -> None:
    case, offset, options = problem
    heads = case.q.shape[1] if per_head else case.kv.n_kv_heads
    chosen = lists_for(case, offset, block_q, heads, density)
    given_ = (case.q, case.kv, chosen, case.table, case.lens)
    options |= {"q_offset": offset, "block_q": block_q}
    want = block_sparse_prefill(*given_, **options, **PRECISE)
    got = block_sparse_prefill(*given_, **options, impl=forced(impl, case), validate=True)
    assert got.out.dtype == case.q.dtype
    assert_close(impl, case, got, want)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    problem=problems(),
    window=st.sampled_from((1, 2, 63, 64, 65, 100, 10_000)),
    sinks=st.sampled_from((0, 1, 4, 64, 90, 10_000)),
)
def test_window_agrees(impl: str, problem: tuple[drawn.Case, Tensor, Any], window: int, sinks: int) -> None:
    case, offset, options = problem
    given_ = (case.q, case.kv, case.table, case.lens)
    options |= {"q_offset": offset, "window": window, "sink_tokens": sinks}
    want = window_prefill(*given_, **options, **PRECISE)
    got = window_prefill(*given_, **options, impl=forced(impl, case), validate=True)
    assert_close(impl, case, got, want)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(problem=problems())
def test_dense_agrees(impl: str, problem: tuple[drawn.Case, Tensor, Any]) -> None:
    case, offset, options = problem
    given_ = (case.q, case.kv, case.table, case.lens)
    want = dense_prefill(*given_, q_offset=offset, **options, **PRECISE)
    got = dense_prefill(*given_, q_offset=offset, **options, impl=forced(impl, case), validate=True)
    assert_close(impl, case, got, want)


@pytest.mark.parametrize("impl", TOKEN_IMPLS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(problem=problems(), density=st.sampled_from((0.0, 0.4, 1.0)), per_head=st.booleans())
def test_token_sparse_agrees(
    impl: str, problem: tuple[drawn.Case, Tensor, Any], density: float, per_head: bool
) -> None:
    case, offset, options = problem
    heads = case.q.shape[1] if per_head else case.kv.n_kv_heads
    chosen = with_own_block(case, offset, heads, density)
    given_ = (case.q, case.kv, chosen, case.lens)
    want = token_sparse_prefill(*given_, q_offset=offset, **options, **PRECISE)
    got = token_sparse_prefill(*given_, q_offset=offset, **options, impl=forced(impl, case), validate=True)
    assert_close(impl, case, got, want)


def forced(impl: str, case: drawn.Case) -> str | None:
    """`impl`, or the dispatcher's choice for pages that it leaves to torch."""
    if impl == "triton":
        return None if case.kv.format == "packed" else impl
    served = case.kv.page_tokens == 64 and (case.kv.format != "int4" or case.kv.head_dim % 32 == 0)
    return None if impl.startswith("cpp") and not served else impl


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_is_causal_attention(impl: str, dtype: torch.dtype) -> None:
    """All blocks, a window as long as the context, no list at all but a diagonal of everything: SDPA."""
    case = drawn.make(kv_heads=2, group=3, rows=200, lens=[200], dtype=dtype, seed=5)
    k, v = (x[:, :, :200].repeat_interleave(3, 1) for x in (case.k, case.v))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    want = sdpa(case.q.double(), k.double(), v.double(), is_causal=True)
    given_ = (case.table, case.lens)
    every = lists_for(case, case.lens - 200, 64, 2, 1.0)
    for got in (
        dense_prefill(case.q, case.kv, *given_, impl=impl),
        window_prefill(case.q, case.kv, *given_, window=200, impl=impl),
        window_prefill(case.q, case.kv, *given_, window=1, sink_tokens=200, impl=impl),
        block_sparse_prefill(case.q, case.kv, every, *given_, block_q=64, impl=impl),
    ):
        assert drawn.relative(got.out, want) <= drawn.RELATIVE[dtype]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cut", [64, 100, 129])
def test_chunks_are_the_whole(impl: str, cut: int) -> None:
    case = drawn.make(kv_heads=2, group=2, rows=230, lens=[260], seed=6)
    given_ = (case.kv, case.table)
    whole = dense_prefill(case.q, *given_, case.lens, impl=impl)
    near = window_prefill(case.q, *given_, case.lens, window=70, sink_tokens=3, impl=impl)
    heads, tails = [], []
    for rows, first, held in ((slice(0, cut), 30, 30 + cut), (slice(cut, 230), 30 + cut, 260)):
        lens = torch.tensor([held], dtype=torch.int32)
        heads.append(dense_prefill(case.q[:, :, rows], *given_, lens, q_offset=first, impl=impl))
        options: dict[str, Any] = {"window": 70, "sink_tokens": 3, "impl": impl}
        tails.append(window_prefill(case.q[:, :, rows], *given_, lens, **options))
    drawn.assert_close(whole, joined(heads), torch.float32)
    drawn.assert_close(near, joined(tails), torch.float32)


def joined(parts: list[Attention]) -> Attention:
    return Attention(torch.cat([p.out for p in parts], 2), torch.cat([p.lse for p in parts], 2))


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_before_the_text_see_nothing(impl: str) -> None:
    case = drawn.make(rows=150, group=2, lens=[80], seed=7)
    got = dense_prefill(case.q, case.kv, case.table, case.lens, impl=impl)
    assert bool(got.lse[:, :, :70].isinf().all()) and not bool(got.out[:, :, :70].any())
    alone = dense_prefill(case.q[:, :, 70:], case.kv, case.table, case.lens, impl=impl)
    drawn.assert_close(Attention(got.out[:, :, 70:], got.lse[:, :, 70:]), alone, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_behind_the_text_see_all_of_it(impl: str) -> None:
    """A batch padded on the right: rows at positions that hold no token."""
    case = drawn.make(rows=300, group=2, lens=[100], seed=8)
    every = lists_for(case, torch.tensor([0]), 128, 1, 1.0)
    want = dense_prefill(case.q, case.kv, case.table, case.lens, q_offset=0, **PRECISE)
    assert bool(want.lse[:, :, 100:].isfinite().all())
    for got in (
        dense_prefill(case.q, case.kv, case.table, case.lens, q_offset=0, impl=impl),
        block_sparse_prefill(case.q, case.kv, every, case.table, case.lens, q_offset=0, impl=impl),
    ):
        drawn.assert_close(got, want, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
def test_page_valid(impl: str) -> None:
    """A page out of position order shows its valid tokens to every row that reaches it."""
    case = drawn.make(batch=2, kv_heads=2, group=2, rows=140, lens=[400, 300], seed=9)
    valid = torch.full((case.kv.n_pages,), -1, dtype=torch.int32)
    for block, held in ((0, 10), (2, 0), (3, 64), (4, 7)):
        valid[case.table[:, block].long()] = held
    kv = replace(case.kv, page_valid=valid)
    chosen = lists_for(case, case.lens - 140, 64, 2, 0.7)
    given_ = (case.table, case.lens)
    options: dict[str, Any] = {"block_q": 64}
    want = block_sparse_prefill(case.q, kv, chosen, *given_, **options, **PRECISE)
    got = block_sparse_prefill(case.q, kv, chosen, *given_, **options, impl=impl)
    drawn.assert_close(got, want, torch.float32)
    near: dict[str, Any] = {"window": 100, "sink_tokens": 5}
    want = window_prefill(case.q, kv, *given_, **near, **PRECISE)
    drawn.assert_close(window_prefill(case.q, kv, *given_, **near, impl=impl), want, torch.float32)
    want = dense_prefill(case.q, kv, *given_, **PRECISE)
    drawn.assert_close(dense_prefill(case.q, kv, *given_, impl=impl), want, torch.float32)


@pytest.mark.parametrize("impl", TOKEN_IMPLS)
def test_token_lists_with_page_valid(impl: str) -> None:
    case = drawn.make(kv_heads=2, group=2, rows=40, lens=[400], seed=10)
    valid = torch.full((case.kv.n_pages,), -1, dtype=torch.int32)
    valid[case.table[0, :3].long()] = torch.tensor([10, 0, 64], dtype=torch.int32)
    kv = replace(case.kv, page_valid=valid)
    chosen = with_own_block(case, case.lens - 40, 2, 0.7)
    want = token_sparse_prefill(case.q, kv, chosen, case.lens, **PRECISE)
    got = token_sparse_prefill(case.q, kv, chosen, case.lens, impl=impl)
    drawn.assert_close(got, want, torch.float32)


@pytest.mark.parametrize("impl", TOKEN_IMPLS)
def test_every_block_for_every_token_is_dense(impl: str) -> None:
    case = drawn.make(kv_heads=2, group=3, rows=70, size=80, lens=[200], seed=11)
    chosen = with_own_block(case, case.lens - 70, 6, 1.0)
    got = token_sparse_prefill(case.q, case.kv, chosen, case.lens, impl=impl)
    want = dense_prefill(case.q, case.kv, case.table, case.lens, **PRECISE)
    drawn.assert_close(got, want, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_queries_and_pages(impl: str) -> None:
    """Queries as model code makes them, and a contiguous cache seen as pages."""
    case = drawn.make(kv_heads=2, group=2, rows=130, size=64, lens=[256], seed=12)
    q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    pages = KVPages.over(case.k[0], case.v[0])
    table = torch.arange(pages.n_pages, dtype=torch.int32)[None]
    want = dense_prefill(case.q, case.kv, case.table, case.lens, **PRECISE)
    drawn.assert_close(dense_prefill(q, pages, table, case.lens, impl=impl), want, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_to_do(impl: str) -> None:
    case = drawn.make(rows=3, lens=[0], seed=13)
    for rows in (0, 3):
        chosen = lists_for(replace(case, q=case.q[:, :, :rows]), torch.tensor([-3]), 128, 1, 1.0)
        q, where = case.q[:, :, :rows], (case.table, case.lens)
        for got in (
            dense_prefill(q, case.kv, *where, impl=impl),
            window_prefill(q, case.kv, *where, window=5, sink_tokens=5, impl=impl),
            block_sparse_prefill(q, case.kv, chosen, *where, impl=impl),
        ):
            assert got.out.shape == q.shape and not bool(got.out.any())
            assert got.lse.shape == q.shape[:3] and bool(got.lse.isneginf().all())


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("impl", [name for name in IMPLS if name.startswith("cpp")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_the_result(
    impl: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentctx.kernels.threads.worth", lambda *_: torch.get_num_threads())
    case = drawn.make(kv_heads=3, group=3, rows=300, lens=[450], dtype=dtype, seed=14)
    chosen = lists_for(case, case.lens - 300, 128, 3, 0.5)
    found = []
    for n in (1, 2):
        torch.set_num_threads(n)
        where = (case.table, case.lens)
        found.append(block_sparse_prefill(case.q, case.kv, chosen, *where, impl=impl))
        found.append(window_prefill(case.q, case.kv, *where, window=100, sink_tokens=4, impl=impl))
        found.append(dense_prefill(case.q, case.kv, *where, impl=impl))
    for one, two in zip(found[:3], found[3:], strict=True):
        assert torch.equal(one.out, two.out) and torch.equal(one.lse, two.lse)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("impl", [name for name in TOKEN_IMPLS if name.startswith("cpp")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_token_lists(
    impl: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentctx.kernels.threads.worth", lambda *_: torch.get_num_threads())
    case = drawn.make(kv_heads=3, group=3, rows=150, lens=[450], dtype=dtype, seed=15)
    chosen = with_own_block(case, case.lens - 150, 3, 0.5)
    found = []
    for n in (1, 2):
        torch.set_num_threads(n)
        found.append(token_sparse_prefill(case.q, case.kv, chosen, case.lens, impl=impl))
    assert torch.equal(found[0].out, found[1].out) and torch.equal(found[0].lse, found[1].lse)


@pytest.mark.parametrize("impl", CHECKED)
def test_pages_outside_the_pool(impl: str) -> None:
    case = drawn.make(rows=80, lens=[200], seed=16)
    chosen = lists_for(case, case.lens - 80, 64, 1, 1.0)
    for wrong in (-1, case.kv.n_pages):
        table = case.table.clone()
        table[0, 2] = wrong
        pages = chosen.pages.clone()
        pages[0, 0, 1, 0] = wrong
        lists = chosen._replace(pages=pages)
        with pytest.raises(IndexError, match="pages"):
            dense_prefill(case.q, case.kv, table, case.lens, impl=impl)
        with pytest.raises(IndexError, match="pages"):
            window_prefill(case.q, case.kv, table, case.lens, window=60, impl=impl)
        with pytest.raises(IndexError, match="pages"):
            block_sparse_prefill(case.q, case.kv, lists, case.table, case.lens, block_q=64, impl=impl)
        with pytest.raises(IndexError, match=f"block_table.* is {wrong}: the pool has"):
            dense_prefill(case.q, case.kv, table, case.lens, impl=impl, validate=True)
        with pytest.raises(IndexError, match=f"selection.pages.* is {wrong}: the pool has"):
            block_sparse_prefill(
                case.q, case.kv, lists, case.table, case.lens, block_q=64, impl=impl, validate=True
            )


@pytest.mark.parametrize("impl", CHECKED)
def test_token_lists_outside_the_pool(impl: str) -> None:
    case = drawn.make(rows=8, lens=[200], seed=17)
    chosen = with_own_block(case, case.lens - 8, 1, 1.0)
    for wrong in (-1, case.kv.n_pages):
        chosen.pages[0, 0, 3, 1] = wrong
        with pytest.raises(IndexError, match="pages"):
            token_sparse_prefill(case.q, case.kv, chosen, case.lens, impl=impl)
        with pytest.raises(IndexError, match=r"selection.pages\[0, 0, 3, 1\]"):
            token_sparse_prefill(case.q, case.kv, chosen, case.lens, impl=impl, validate=True)


def test_lists_out_of_order_or_at_the_diagonal() -> None:
    case = drawn.make(rows=64, lens=[256], seed=18)
    chosen = lists_for(case, case.lens - 64, 64, 1, 1.0)
    given_ = (case.table, case.lens)
    swapped = chosen._replace(blocks=chosen.blocks.flip(-1).contiguous())
    swapped.blocks[..., :3] = torch.tensor([2, 1, 0])
    with pytest.raises(IndexError, match="ascend"):
        block_sparse_prefill(case.q, case.kv, swapped, *given_, block_q=64, validate=True)
    chosen.blocks[0, 0, 0, 2] = 3
    with pytest.raises(IndexError, match=r"selection.blocks\[0, 0, 0, 2\] is 3"):
        block_sparse_prefill(case.q, case.kv, chosen, *given_, block_q=64, validate=True)
    chosen.counts[0, 0, 0] = 99
    with pytest.raises(IndexError, match=r"selection.counts\[0, 0, 0\] is 99"):
        block_sparse_prefill(case.q, case.kv, chosen, *given_, block_q=64, validate=True)


def test_bad_arguments_are_named() -> None:
    case = drawn.make(kv_heads=2, group=2, rows=5, lens=[100], seed=19)
    where = (case.table, case.lens)
    chosen = lists_for(case, case.lens - 5, 128, 2, 1.0)
    with pytest.raises(ValueError, match="window is 0"):
        window_prefill(case.q, case.kv, *where, window=0)
    with pytest.raises(ValueError, match="sink_tokens is -1"):
        window_prefill(case.q, case.kv, *where, window=5, sink_tokens=-1)
    with pytest.raises(ValueError, match="block_q is 0"):
        block_sparse_prefill(case.q, case.kv, chosen, *where, block_q=0)
    with pytest.raises(ValueError, match="selection"):
        block_sparse_prefill(case.q, case.kv, chosen, *where, block_q=2)
    with pytest.raises(TypeError, match="selection"):
        token_sparse_prefill(case.q, case.kv, tuple(chosen), case.lens)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="q_offset is torch.int64"):
        dense_prefill(case.q, case.kv, *where, q_offset=torch.tensor([3]))
    with pytest.raises(TypeError, match="q_offset is float"):
        dense_prefill(case.q, case.kv, *where, q_offset=3.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="context_lens"):
        dense_prefill(case.q, case.kv, case.table, case.lens.long())
    with pytest.raises(ValueError, match="block_table"):
        dense_prefill(case.q, case.kv, case.table[0], case.lens)
    with pytest.raises(ValueError, match="softcap is -1"):
        dense_prefill(case.q, case.kv, *where, softcap=-1)
    with pytest.raises(ValueError, match="q has head size 32"):
        dense_prefill(case.q[..., :32], case.kv, *where)
    with pytest.raises(ValueError, match="they must be equal"):
        dense_prefill(case.q.bfloat16(), case.kv, *where)
