"""The prefill kernels: drawn cases against the float64 reference, both program orders, guarded memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton_cases  # isort: skip  (before Triton)
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

PRECISE: dict[str, Any] = {"impl": "reference", "out_dtype": torch.float32, "validate": True}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@st.composite
def problems(draw: st.DrawFn, rows: tuple[int, ...] = (1, 5, 70, 130)) -> tuple[drawn.Case, Tensor, Any]:
    """A small case, the position of its first row, and options; tiles have their real sizes."""
    batch = draw(st.integers(1, 2))
    format = draw(st.sampled_from(("paged", "paged", "int8", "int4")))
    case = drawn.make(
        batch=batch,
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 2 if batch == 1 else 1)),
        rows=draw(st.sampled_from(rows)),
        size=draw(st.sampled_from((32, 64, 80, 128))),
        page=draw(st.sampled_from((16, 64, 64, 128))),
        lens=draw(st.lists(st.sampled_from((0, 1, 63, 64, 65, 128, 150)), min_size=batch, max_size=batch)),
        dtype=draw(st.sampled_from((BF16, BF16, FP16))),
        format=format,
        seed=draw(st.integers(0, 2**16)),
    )
    drift = draw(st.sampled_from((0, 0, -1, -37, 5)))
    options = {"q_offset": case.lens - case.q.shape[2] + drift, "softcap": draw(st.sampled_from((0.0, 20.0)))}
    return case, options["q_offset"], options


def agree(case: drawn.Case, found: list[Attention], want: Attention) -> None:
    for got in found:
        assert got.out.dtype == case.q.dtype
        assert_close("triton", case, got, want)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(problem=problems())
def test_dense(problem: tuple[drawn.Case, Tensor, Any]) -> None:
    case, _, options = problem
    ask = (case.q, case.kv, case.table, case.lens)
    want = dense_prefill(*ask, **options, **PRECISE)
    agree(case, triton_cases.both_orders(lambda: dense_prefill(*ask, **options, impl="triton")), want)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    problem=problems(),
    window=st.sampled_from((1, 63, 65, 100, 10_000)),
    sinks=st.sampled_from((0, 1, 64, 90, 10_000)),
)
def test_window(problem: tuple[drawn.Case, Tensor, Any], window: int, sinks: int) -> None:
    case, _, options = problem
    ask = (case.q, case.kv, case.table, case.lens)
    options |= {"window": window, "sink_tokens": sinks}
    want = window_prefill(*ask, **options, **PRECISE)
    agree(case, triton_cases.both_orders(lambda: window_prefill(*ask, **options, impl="triton")), want)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    problem=problems(),
    block_q=st.sampled_from((40, 64, 128, 192)),
    density=st.sampled_from((0.0, 0.6, 1.0)),
    per_head=st.booleans(),
)
def test_block_sparse(
    problem: tuple[drawn.Case, Tensor, Any], block_q: int, density: float, per_head: bool
) -> None:
    case, offset, options = problem
    heads = case.q.shape[1] if per_head else case.kv.n_kv_heads
    chosen = lists_for(case, offset, block_q, heads, density)
    ask = (case.q, case.kv, chosen, case.table, case.lens)
    options |= {"block_q": block_q}
    want = block_sparse_prefill(*ask, **options, **PRECISE)
    agree(case, triton_cases.both_orders(lambda: block_sparse_prefill(*ask, **options, impl="triton")), want)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(problem=problems(rows=(1, 4)), density=st.sampled_from((0.0, 0.6, 1.0)), per_head=st.booleans())
def test_token_sparse(problem: tuple[drawn.Case, Tensor, Any], density: float, per_head: bool) -> None:
    case, offset, options = problem
    heads = case.q.shape[1] if per_head else case.kv.n_kv_heads
    chosen = with_own_block(case, offset, heads, density)
    ask = (case.q, case.kv, chosen, case.lens)
    want = token_sparse_prefill(*ask, **options, **PRECISE)
    agree(case, triton_cases.both_orders(lambda: token_sparse_prefill(*ask, **options, impl="triton")), want)


def test_float32_is_float32() -> None:
    """Products of float32 queries are not rounded to tf32, scores of all sizes, a large head."""
    case = drawn.make(rows=20, size=128, lens=[70], magnitude=2.0, seed=4)
    ask = (case.q, case.kv, case.table, case.lens)
    want = dense_prefill(*ask, **PRECISE)
    agree(case, triton_cases.both_orders(lambda: dense_prefill(*ask, impl="triton")), want)


def test_three_heads_of_a_list_and_a_head_size_of_256() -> None:
    case = drawn.make(kv_heads=1, group=3, rows=3, size=256, lens=[130], dtype=BF16, seed=5)
    chosen = with_own_block(case, case.lens - 3, 1, 0.7)
    ask = (case.q, case.kv, chosen, case.lens)
    want = token_sparse_prefill(*ask, **PRECISE)
    agree(case, triton_cases.both_orders(lambda: token_sparse_prefill(*ask, impl="triton")), want)
    dense = (case.q, case.kv, case.table, case.lens)
    want = dense_prefill(*dense, **PRECISE)
    agree(case, triton_cases.both_orders(lambda: dense_prefill(*dense, impl="triton")), want)


@pytest.mark.parametrize("page", [64, 128])
def test_page_valid(page: int) -> None:
    """A page out of position order shows its valid tokens to every row that reaches it."""
    case = drawn.make(rows=70, page=page, lens=[5 * page - 20], dtype=BF16, seed=9)
    valid = torch.full((case.kv.n_pages,), -1, dtype=torch.int32)
    for block, held in ((0, 10), (2, 0), (3, page), (4, 7)):
        valid[case.table[:, block].long()] = held
    kv = replace(case.kv, page_valid=valid)
    chosen = lists_for(case, case.lens - 70, 64, 1, 0.7)
    where = (case.table, case.lens)
    near = {"window": page + 30, "sink_tokens": 5}
    want = block_sparse_prefill(case.q, kv, chosen, *where, block_q=64, **PRECISE)
    for got in triton_cases.both_orders(
        lambda: block_sparse_prefill(case.q, kv, chosen, *where, block_q=64, impl="triton")
    ):
        drawn.assert_close(got, want, BF16)
    want = window_prefill(case.q, kv, *where, **near, **PRECISE)
    for got in triton_cases.both_orders(lambda: window_prefill(case.q, kv, *where, **near, impl="triton")):
        drawn.assert_close(got, want, BF16)
    rows = with_own_block(case, case.lens - 70, 1, 0.7)
    q = case.q[:, :, -3:]
    tail = rows._replace(**{name: x[:, :, -3:] for name, x in rows._asdict().items()})
    want = token_sparse_prefill(q, kv, tail, case.lens, **PRECISE)
    for got in triton_cases.both_orders(lambda: token_sparse_prefill(q, kv, tail, case.lens, impl="triton")):
        drawn.assert_close(got, want, BF16)


def test_rows_before_and_behind_the_text() -> None:
    case = drawn.make(rows=150, lens=[80], dtype=BF16, seed=7)
    ask = (case.q, case.kv, case.table, case.lens)
    for offset in (-70, 0):
        want = dense_prefill(*ask, q_offset=offset, **PRECISE)
        for got in triton_cases.both_orders(
            lambda at=offset: dense_prefill(*ask, q_offset=at, impl="triton")
        ):
            drawn.assert_close(got, want, BF16)
    every = lists_for(case, torch.tensor([0]), 64, 1, 1.0)
    given_ = (case.q, case.kv, every, case.table, case.lens)
    want = block_sparse_prefill(*given_, q_offset=0, block_q=64, **PRECISE)
    for got in triton_cases.both_orders(
        lambda: block_sparse_prefill(*given_, q_offset=0, block_q=64, impl="triton")
    ):
        drawn.assert_close(got, want, BF16)


def test_strided_queries_and_a_contiguous_cache_as_pages() -> None:
    case = drawn.make(kv_heads=2, group=1, rows=70, size=64, lens=[128], dtype=BF16, seed=12)
    q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    pages = KVPages.over(case.k[0], case.v[0])
    table = torch.arange(pages.n_pages, dtype=torch.int32)[None]
    want = dense_prefill(case.q, case.kv, case.table, case.lens, **PRECISE)
    for got in triton_cases.both_orders(lambda: dense_prefill(q, pages, table, case.lens, impl="triton")):
        drawn.assert_close(got, want, BF16)


def test_nothing_to_do() -> None:
    case = drawn.make(rows=3, lens=[0], seed=13)
    for rows in (0, 3):
        q = case.q[:, :, :rows]
        chosen = lists_for(replace(case, q=q), torch.tensor([-3]), 128, 1, 1.0)
        with triton_cases.guarded_memory():
            found = (
                dense_prefill(q, case.kv, case.table, case.lens, impl="triton"),
                block_sparse_prefill(q, case.kv, chosen, case.table, case.lens, impl="triton"),
            )
        for got in found:
            assert got.out.shape == q.shape and not bool(got.out.any())
            assert got.lse.shape == q.shape[:3] and bool(got.lse.isneginf().all())


def test_pages_outside_the_pool_are_caught() -> None:
    """In the interpreter, that is: on a GPU `validate=True` finds them."""
    case = drawn.make(rows=70, lens=[200], dtype=BF16, seed=16)
    chosen = lists_for(case, case.lens - 70, 64, 1, 1.0)
    chosen.pages[0, 0, 1, 0] = case.kv.n_pages + 40
    with triton_cases.fault("out-of-bounds load"):
        block_sparse_prefill(case.q, case.kv, chosen, case.table, case.lens, block_q=64, impl="triton")
    table = case.table.clone()
    table[0, 1] = -40
    with triton_cases.fault("out-of-bounds load"):
        dense_prefill(case.q, case.kv, table, case.lens, impl="triton")
    rows = with_own_block(case, case.lens - 70, 1, 1.0)
    rows.pages[0, 0, 3, 1] = -40
    with triton_cases.fault("out-of-bounds load"):
        token_sparse_prefill(case.q, case.kv, rows, case.lens, impl="triton")
