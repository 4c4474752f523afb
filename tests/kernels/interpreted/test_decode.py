"""The decode kernels in Triton's interpreter against the float64 reference, in two program orders."""

from __future__ import annotations

from typing import Any

import drawn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interp import guarded
from torch import Tensor
from triton.runtime.errors import InterpreterError
from triton_cases import both_orders, fault

from agentctx.kernels.decode import dense_decode, sparse_decode
from agentctx.kernels.errors import KernelUnavailable
from agentctx.kernels.gpu.decode_paged import attend_paged
from agentctx.kernels.records import Attention, BlockSelection, KVPages

few = settings(max_examples=8, deadline=None, derandomize=True)
FORMATS = ("paged", "int8", "int4")


def ints(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@st.composite
def problems(draw: st.DrawFn) -> tuple[drawn.Case, dict[str, Any]]:
    """A case of any format and options of any kind, small enough for an interpreter."""
    format = draw(st.sampled_from(FORMATS))
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    magnitudes = (1.0, 1e-3) if format != "paged" else (1.0, 1e-3, 8.0)
    case = draw(drawn.cases(dtypes=dtypes, formats=(format,), magnitudes=magnitudes, max_tokens=150))
    options: dict[str, Any] = {
        "softcap": draw(st.sampled_from((0.0, 0.0, 5.0))),
        "scale": draw(st.sampled_from((None, 0.05))),
        "splits": draw(st.sampled_from((None, 1, 3))),
        "out_dtype": draw(st.sampled_from((None, torch.float32))),
    }
    if draw(st.booleans()):
        first = [draw(st.integers(0, int(n) + 1)) for n in case.lens]
        options |= {"first_pos": ints(first), "sink_tokens": draw(st.integers(0, 20))}
    if format != "paged" and draw(st.booleans()):
        options["tail"] = case.tail
    elif draw(st.booleans()):
        case.kv = KVPages(
            *(case.kv.k, case.kv.v, case.kv.page_tokens, case.kv.head_dim, case.kv.format),
            *(case.kv.k_scale, case.kv.v_scale, validity(case)),
        )
    return case, options


def validity(case: drawn.Case) -> Tensor:
    """For about half the pages some number of tokens that were written, for the others -1."""
    page = case.kv.page_tokens
    valid = torch.full((case.kv.n_pages,), -1, dtype=torch.int32)
    for b, length in enumerate(case.lens.tolist()):
        for j in range(0, int(case.blocks[b]), 2):
            real = min(page, length - j * page)
            valid[case.table[b, j]] = torch.randint(0, real + 1, (), generator=case.generator)
    return valid


def agree(case: drawn.Case, lists: BlockSelection | None, **options: Any) -> None:
    def call(impl: str, **more: Any) -> Attention:
        every = options | more | {"impl": impl, "validate": True}
        if lists is None:
            return dense_decode(case.q, case.kv, case.table, case.lens, **every)
        return sparse_decode(case.q, case.kv, lists, case.lens, **every)

    want = call("reference", out_dtype=torch.float32)
    largest = case.largest(options.get("scale"))
    for got in both_orders(lambda: call("triton")):
        assert got.out.dtype == (options.get("out_dtype") or case.q.dtype)
        drawn.assert_close(got, want, case.q.dtype, quantised=case.kv.quantised, largest=largest)


@few
@given(problem=problems())
def test_dense_agrees(problem: tuple[drawn.Case, dict[str, Any]]) -> None:
    case, options = problem
    agree(case, None, **options)


@few
@given(problem=problems(), per_head=st.booleans(), density=st.sampled_from((0.0, 0.6, 1.0)))
def test_sparse_agrees(problem: tuple[drawn.Case, dict[str, Any]], per_head: bool, density: float) -> None:
    case, options = problem
    heads = case.q.shape[1] if per_head else case.kv.n_kv_heads
    agree(case, case.selection(heads=heads, density=density), **options)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("page", (16, 64, 128))
def test_every_format_at_every_page_size(format: str, page: int) -> None:
    """A page of its own tile, pages that share one, pages that span two; the open one in the tail."""
    case = drawn.make(
        lens=[3, page + 1], batch=2, group=4, rows=3, page=page, format=format, dtype=torch.bfloat16
    )
    agree(case, None, tail=case.tail, splits=2)
    agree(case, case.selection(density=1.0), splits=1)


@pytest.mark.parametrize("size", (16, 32, 80, 128, 256))
def test_head_sizes(size: int) -> None:
    for format in ("paged", "int8", "int4"):
        case = drawn.make(lens=[70], group=2, size=size, format=format, dtype=torch.bfloat16)
        agree(case, None, splits=2)


def test_a_window_skips_blocks_and_keeps_sinks() -> None:
    case = drawn.make(lens=[1000, 500], batch=2, group=4, dtype=torch.bfloat16)
    for first, sinks in (([990, 499], 0), ([990, 300], 4), ([1000, 500], 70), ([5000, -3], 3)):
        agree(case, None, first_pos=ints(first), sink_tokens=sinks, splits=2)
        agree(case, case.selection(), first_pos=ints(first), sink_tokens=sinks)


def test_many_rows_many_splits() -> None:
    """64 rows of a list, and one more split than there are tiles in the other list."""
    case = drawn.make(lens=[700, 40], batch=2, group=16, rows=4, dtype=torch.bfloat16)
    agree(case, None, splits=5)


def test_the_ragged_pool_view() -> None:
    """Heads of different lengths: pages of single heads, head stride 0, `page_valid` for each tile."""
    case = drawn.make(lens=[256], kv_heads=3, group=2, dtype=torch.bfloat16)
    tiles = case.kv.n_pages * 3

    def ragged(x: Tensor) -> Tensor:
        return x.reshape(tiles, 1, 64, 64).expand(tiles, 3, 64, 64)

    valid = torch.randint(0, 65, (tiles,), generator=case.generator, dtype=torch.int32)
    kv = KVPages(ragged(case.kv.k), ragged(case.kv.v), 64, 64, page_valid=valid)
    pages = case.table[:, None, :4] * 3 + ints([0, 1, 2])[:, None]
    lists = BlockSelection(pages, torch.arange(4, dtype=torch.int32).repeat(1, 3, 1), ints([[4, 0, 3]]))
    want = sparse_decode(case.q, kv, lists, case.lens, impl="reference", out_dtype=torch.float32)
    for got in both_orders(lambda: sparse_decode(case.q, kv, lists, case.lens, impl="triton")):
        drawn.assert_close(got, want, torch.bfloat16)


def test_extreme_magnitudes() -> None:
    """Scores from 1e-40 to 1e6: no overflow, no NaN; one key wins where they are huge."""
    for magnitude in (1e-20, 1000.0):
        for softcap in (0.0, 30.0):
            agree(
                drawn.make(lens=[100], group=3, magnitude=magnitude, dtype=torch.bfloat16),
                None,
                softcap=softcap,
            )


def test_strides() -> None:
    """Queries out of a wider tensor, lists out of a wider one, pools that are part of a larger one."""
    case = drawn.make(lens=[130], kv_heads=2, group=3, rows=2)
    wide = torch.randn(1, 2, 6, 3 * 64, generator=case.generator)
    q = wide[..., 64:128].transpose(1, 2)
    deep = torch.stack([case.kv.k, case.kv.v], 2)  # [P, Hkv, 2, page, D]
    kv = KVPages(deep[:, :, 0], deep[:, :, 1], 64, 64)
    lists = case.selection(density=1.0)
    apart = BlockSelection(*(torch.stack([x, x], -1)[..., 0] for x in lists))
    want = dense_decode(q.contiguous(), case.kv, case.table, case.lens, impl="reference")
    for got in both_orders(lambda: sparse_decode(q, kv, apart, case.lens, impl="triton")):
        drawn.assert_close(got, want, torch.float32)


def test_what_is_left_to_torch() -> None:
    wide = drawn.make(lens=[70], group=17, rows=4)
    odd = drawn.make(lens=[70], size=40)
    packed = drawn.make(lens=[70], format="packed")
    for case, words in ((wide, "68 rows"), (odd, "head size 40"), (packed, "packed")):
        with pytest.raises(KernelUnavailable, match=words):
            dense_decode(case.q, case.kv, case.table, case.lens, impl="triton")


def test_empty_lists_of_no_slots() -> None:
    case = drawn.make(lens=[70], kv_heads=2)
    none = BlockSelection(*(torch.empty(1, 2, 0, dtype=torch.int32) for _ in "pb"), ints([[0, 0]]))
    got = sparse_decode(case.q, case.kv, none, case.lens, impl="triton")
    assert not got.out.any() and bool((got.lse == -torch.inf).all())


# --- what must be caught ---


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("page", (-1, 2**31 - 1))
def test_a_page_outside_the_pool_is_caught(format: str, page: int) -> None:
    case = drawn.make(lens=[130], kv_heads=2, format=format, dtype=torch.bfloat16)
    lists = case.selection(density=1.0)
    lists.pages[0, 1, 1] = page
    with fault("out-of-bounds load"):
        sparse_decode(case.q, case.kv, lists, case.lens, impl="triton")


def test_a_count_beyond_the_list_reads_no_further() -> None:
    case = drawn.make(lens=[130], kv_heads=2)
    lists = case.selection(density=1.0)
    full = BlockSelection(*(x[..., :2].contiguous() for x in lists[:2]), ints([[9, 2]]))
    fair = full._replace(counts=ints([[2, 2]]))
    want = sparse_decode(case.q, case.kv, fair, case.lens, impl="reference")
    for got in both_orders(lambda: sparse_decode(case.q, case.kv, full, case.lens, impl="triton")):
        drawn.assert_close(got, want, torch.float32)


def launch(out: Tensor, *, lists: int = 2, ticket: int = 0, alone: bool = False) -> Tensor:
    """The kernel by hand, in two splits, over two KV heads of two rows of D 64; returns the lse."""
    case = drawn.make(lens=[128], kv_heads=2, group=2)
    q, kv = guarded(case.q), case.kv
    lse, part = guarded(torch.full((1, 4, 1), torch.nan)), guarded(torch.full((8, 64), torch.nan))
    part_lse, tickets = guarded(part[:, 0]), guarded(torch.full((2,), ticket, dtype=torch.int32))
    k, v, table, lens = guarded(kv.k), guarded(kv.v), guarded(case.table), guarded(case.lens)
    tensors = (q, k, v, q, q, table, table, lens, lens, lens, lens, q, q, out, lse, part, part_lse, tickets)
    strides = (*q.stride()[:3], *k.stride()[:2], *v.stride()[:2], *[0] * 8)
    sizes = {"GROUP": 2, "SHARE": 1, "ROWS": 2, "D": 64, "DP": 64, "PAGE": 64, "N": 64, "DENSE": True}
    flags = dict.fromkeys(("CAPPED", "WINDOW", "VALID", "TAIL", "INT4"), False) | {"ALONE": alone}
    attend_paged[2, lists, 1](*tensors, 0.1, 0.0, 0, 2, 2, 1, *strides, **sizes, **flags)
    return lse


def room() -> Tensor:
    return guarded(torch.full((1, 4, 1, 64), torch.nan))


def test_by_hand_it_is_right() -> None:
    out = room()
    assert not bool(launch(out).isnan().any() or out.isnan().any())


def test_two_programs_on_one_address_are_caught() -> None:
    """Both splits believe to be alone and write the rows of the output."""
    with pytest.raises(InterpreterError, match="stored by program"):
        launch(room(), alone=True)


def test_an_output_that_is_too_small_is_caught() -> None:
    with pytest.raises(InterpreterError, match="out-of-bounds store"):
        launch(guarded(torch.full((1, 3, 1, 64), torch.nan)))


def test_a_forgotten_list_stays_visible() -> None:
    out = room()
    lse = launch(out, lists=1)
    assert bool(lse[0, 2:].isnan().all()) and bool(out[0, 2:].isnan().all())


def test_a_stale_ticket_stays_visible() -> None:
    """Who counts wrongly unites nothing: the output stays as it was."""
    out = room()
    assert bool(launch(out, ticket=7).isnan().all() and out.isnan().all())


def test_an_overflow_is_caught() -> None:
    case = drawn.make(lens=[130])
    lists = case.selection(density=1.0)
    lists.blocks[0, 0, 1] = 2**30
    with fault("overflow"):
        sparse_decode(case.q, case.kv, lists, case.lens, impl="triton")
