"""Writes into pages with their summaries, changes of layout, copies: against the layouts as defined."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import drawn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentctx.kernels.errors import KernelUnavailable
from agentctx.kernels.quant import quantize_pages
from agentctx.kernels.records import BlockSummary, KVPages
from agentctx.kernels.store import copy_pages, pack_pages, unpack_pages, write_kv

IMPLEMENTATIONS = drawn.implementations("write_kv")
PACKING = [name for name in IMPLEMENTATIONS if name != "triton"]  # packed pages are the CPU's


def summaries(kv: KVPages, batch: int, blocks: int) -> list[BlockSummary]:
    """One of each kind that fits the pool, full of NaN."""
    heads, size, page, dtype = kv.n_kv_heads, kv.head_dim, kv.page_tokens, kv.k.dtype

    def nan(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.full((batch, heads, *shape), float("nan"), dtype=of)

    return [
        BlockSummary("minmax", nan(2 * size, blocks), page),
        BlockSummary("mean", nan(blocks, size, of=dtype), page),
        BlockSummary("vmax", nan(blocks), page),
        BlockSummary("submeans", nan(page // 16 * blocks, size, of=dtype), page),
    ]


def copied(kv: KVPages) -> KVPages:
    return replace(kv, k=kv.k.clone(), v=kv.v.clone())


@st.composite
def writes(draw: st.DrawFn) -> tuple[drawn.Case, Tensor, Tensor, Tensor, int]:
    """A case, new K and V that are views of projections, positions, and whether summaries are asked for."""
    sizes = (2, 32, 50, 64, 80, 128)
    case = draw(drawn.cases(sizes=sizes, max_rows=1, max_tokens=150))
    page, blocks = case.kv.page_tokens, case.table.shape[1]
    tokens = draw(st.one_of(st.integers(0, min(100, blocks * page)), st.sampled_from((1, page))))
    start = [draw(st.integers(0, min(held, blocks * page - tokens))) for held in case.lens.tolist()]
    shape = (len(case.lens), tokens, case.kv.n_kv_heads, case.kv.head_dim)
    k, v = (torch.randn(shape, generator=case.generator).to(case.q.dtype).transpose(1, 2) for _ in range(2))
    return case, k, v, torch.tensor(start, dtype=torch.int32), draw(st.integers(0, 4))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(write=writes())
def test_a_write_agrees_with_the_layouts_as_defined(impl, write):
    case, k, v, start, asked = write
    got, want = copied(case.kv), copied(case.kv)
    of = summaries(got, len(start), case.table.shape[1])[:asked]
    reference = [replace(one, data=one.data.clone()) for one in of]
    if impl == "triton" and got.format == "packed":
        if k.numel():
            with pytest.raises(KernelUnavailable, match="packed"):
                write_kv(got, k, v, case.table, start, impl=impl)
        return
    write_kv(got, k, v, case.table, start, summary=of, impl=impl)
    write_kv(want, k, v, case.table, start, summary=reference, impl="reference")
    assert torch.equal(got.k, want.k) and torch.equal(got.v, want.v)
    for one, other in zip(of, reference, strict=True):
        touched = ~other.data.isnan()
        assert torch.equal(~one.data.isnan(), touched), f"{one.kind}: other entries were written"
        if one.kind == "minmax":
            assert torch.equal(one.data[touched], other.data[touched])
        else:
            rtol = 1e-5 if one.data.dtype == torch.float32 else 8e-3
            near = torch.allclose(one.data[touched], other.data[touched], rtol=rtol, atol=1e-5)
            assert near, one.kind


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("format", ["paged", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_by_token_is_all_at_once(impl, format, dtype):
    if impl == "triton" and format == "packed":
        pytest.skip("packed pages are the CPU's")
    case = drawn.make(batch=2, kv_heads=3, size=80, lens=[130, 130], dtype=dtype, format=format)
    k, v = case.k[:, :, :130], case.v[:, :, :130]
    once, slowly = (KVPages.empty(11, 3, 80, dtype=dtype, format=format) for _ in range(2))
    of_once, of_slowly = (summaries(once, 2, 64) for _ in range(2))
    start = torch.zeros(2, dtype=torch.int32)
    write_kv(once, k, v, case.table, start, summary=of_once, impl=impl, validate=True)
    for t in range(130):
        row = slice(t, t + 1)
        write_kv(slowly, k[:, :, row], v[:, :, row], case.table, start + t, summary=of_slowly, impl=impl)
    assert torch.equal(once.k, slowly.k) and torch.equal(once.v, slowly.v)
    plain = unpack_pages(once, impl=impl) if format == "packed" else once
    assert torch.equal(plain.k[case.table[1, 2].long(), :, :2], k[1, :, 128:130])
    for one, other in zip(of_once, of_slowly, strict=True):
        assert torch.allclose(one.data, other.data, rtol=1e-6, atol=1e-6, equal_nan=True), one.kind
        held = one.data[..., :3] if one.kind in ("minmax", "vmax") else one.data[:, :, :3]
        assert not bool(held.isnan().any())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_stale_values_stay_out_of_the_open_block(impl):
    kv = KVPages.empty(2, 1, 32, dtype=torch.float32)
    kv.k.fill_(drawn.STALE)
    kv.v.fill_(drawn.STALE)
    of = summaries(kv, 1, 2)
    table, start = torch.tensor([[1, 0]], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    write_kv(kv, torch.ones(1, 1, 5, 32), torch.ones(1, 1, 5, 32), table, start, summary=of, impl=impl)
    kinds = {one.kind: one.data for one in of}
    assert torch.equal(kinds["minmax"][0, 0, :, 0], torch.ones(64))
    assert torch.equal(kinds["mean"][0, 0, 0], torch.ones(32))
    assert torch.allclose(kinds["vmax"][0, 0, 0], torch.tensor(32.0).sqrt())
    assert torch.equal(kinds["submeans"][0, 0, :4].amax(1), torch.tensor([1.0, 0, 0, 0]))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("start", "pages", "named"),
    [
        (60, [0, 4], r"block_table\[0, 1\] is 4: the pool has 4 pages"),
        (60, [0, -1], r"block_table\[0, 1\] is -1: the pool has 4 pages"),
        (64, [7, 1], r"block_table\[0, 0\] is 7: the pool has 4 pages"),
        (-1, [0, 1], r"start_pos\[0\] is -1"),
        (127, [0, 1], r"start_pos\[0\] is 127"),
        (2**31 - 2, [0, 1], r"start_pos\[0\] is 2147483646"),
    ],
)
def test_what_does_not_exist_is_refused_before_anything_is_written(impl, start, pages, named):
    kv = KVPages.empty(4, 2, 32)
    of = summaries(kv, 1, 2)
    rows = torch.ones(1, 2, 8, 32, dtype=torch.bfloat16)
    table, at = torch.tensor([pages], dtype=torch.int32), torch.tensor([start], dtype=torch.int32)
    if impl != "triton":  # which looks at positions and pages with `validate` only
        with pytest.raises(IndexError, match=named):
            write_kv(kv, rows, rows, table, at, summary=of, impl=impl)
    with pytest.raises(IndexError):
        write_kv(kv, rows, rows, table, at, summary=of, impl=impl, validate=True)
    assert not bool(kv.k.any()) and not bool(kv.v.any())
    assert all(bool(one.data.isnan().all()) for one in of)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_summary_without_room_is_refused(impl):
    kv = KVPages.empty(4, 1, 32)
    rows = torch.ones(1, 1, 1, 32, dtype=torch.bfloat16)
    table, at = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([64], dtype=torch.int32)
    for one in summaries(kv, 1, 1):
        for validate in (True,) if impl == "triton" else (False, True):
            with pytest.raises(IndexError, match="start_pos"):
                write_kv(kv, rows, rows, table, at, summary=one, impl=impl, validate=validate)
    assert not bool(kv.k.any())


def test_half_precision_pages_are_written_by_torch():
    kv = KVPages.empty(2, 1, 32, dtype=torch.float16)
    rows = torch.ones(1, 1, 1, 32, dtype=torch.float16)
    table, at = torch.tensor([[1]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    write_kv(kv, rows, rows, table, at)
    assert torch.equal(kv.k[1, 0].sum(1).nonzero()[:, 0], torch.tensor([3]))


@pytest.mark.parametrize("impl", PACKING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 50, 64, 80, 256])
def test_packing_is_a_permutation_of_bits(impl, dtype, size):
    case = drawn.make(batch=1, kv_heads=2, size=size, lens=[100], dtype=dtype)
    case.kv.k[0, 0, 0, 0] = float("nan")
    packed, want = pack_pages(case.kv, impl=impl), pack_pages(case.kv, impl="reference")
    assert packed.format == "packed" and packed.k.shape == want.k.shape
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(packed.k.view(bits), want.k.view(bits)) and torch.equal(packed.v, want.v)
    for made_by in (impl, "reference"):
        back = unpack_pages(packed, impl=made_by)
        assert torch.equal(back.k.view(bits), case.kv.k.view(bits)) and torch.equal(back.v, case.kv.v)
        assert back.format == "paged" and back.v.data_ptr() != packed.v.data_ptr()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_pages_by_strides_are_served(impl):
    k, v = (torch.randn(2, 192, 64, generator=torch.Generator().manual_seed(i)) for i in range(2))
    kv = KVPages.over(k.clone(), v.clone())
    if impl in PACKING:
        assert torch.equal(pack_pages(kv, impl=impl).k, pack_pages(kv, impl="reference").k)
    rows = torch.zeros(1, 2, 3, 64)
    table, at = torch.tensor([[0, 1, 2]], dtype=torch.int32), torch.tensor([63], dtype=torch.int32)
    write_kv(kv, rows, rows, table, at, impl=impl)
    assert torch.equal(kv.k[0, :, 63], rows[0, :, 0]) and not bool(kv.v[1, :, :2].any())
    assert torch.equal(kv.k[1, :, 2:], k[:, 66:128].contiguous())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("format", ["paged", "packed", "int8", "int4"])
def test_copies_are_exact_in_every_format(impl, format):
    case = drawn.make(kv_heads=2, size=50, lens=[200], dtype=torch.bfloat16, format=format)
    valid = torch.arange(case.kv.n_pages, dtype=torch.int32)
    src = replace(case.kv, page_valid=valid)
    dst = KVPages.empty(5, 2, 50, format=format)
    dst = replace(dst, page_valid=torch.full((5,), -1, dtype=torch.int32))
    ids = torch.tensor([[3, 0], [1, 4], [3, 2]], dtype=torch.int32)
    copy_pages(src, dst, ids, impl=impl)
    assert dst.page_valid is not None and dst.page_valid.tolist() == [3, -1, 3, -1, 1]
    for name in ("k", "v", "k_scale", "v_scale"):
        one, other = getattr(src, name), getattr(dst, name)
        if one is not None:
            assert torch.equal(other[0], one[3]) and torch.equal(other[4], one[1])
            assert torch.equal(other[2], one[3]) and not bool(other[1].any()) and not bool(other[3].any())
    copy_pages(dst, dst, torch.tensor([[0, 1]], dtype=torch.int32), impl=impl)
    assert torch.equal(dst.k[1], src.k[3])


@pytest.fixture
def team(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setattr("agentctx.kernels.threads.worth", lambda *_: torch.get_num_threads())
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("impl", [name for name in IMPLEMENTATIONS if name.startswith("cpp")])
def test_one_and_two_threads_agree(impl, team):
    case = drawn.make(batch=2, kv_heads=3, size=64, lens=[300, 300], dtype=torch.bfloat16)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        kv = KVPages.empty(case.kv.n_pages, 3, 64, format="packed")
        of = summaries(kv, 2, 64)
        start = torch.tensor([0, 5], dtype=torch.int32)
        write_kv(kv, case.k[:, :, :300], case.v[:, :, :300], case.table, start, summary=of, impl=impl)
        packed = pack_pages(case.kv, impl=impl)
        results.append([kv.k, kv.v, packed.k, packed.v, *(one.data.nan_to_num() for one in of)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


KV = KVPages.empty(4, 2, 32, dtype=torch.float32)
ROWS, TABLE, AT = torch.zeros(1, 2, 3, 32), torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1).int()
INT8 = quantize_pages(torch.zeros(4, 2, 64, 32), torch.zeros(4, 2, 64, 32), 8)
IDS = torch.zeros(1, 2, dtype=torch.int32)


def summary(kind: str, *shape: int, page: int = 64) -> BlockSummary:
    return BlockSummary(kind, torch.zeros(shape), page)


def written(k: object = ROWS, v: object = ROWS, table: object = TABLE, at: object = AT, kv=KV, of=None):
    return lambda: write_kv(kv, k, v, table, at, summary=of)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (written(kv=INT8), ValueError, "kv has format 'int8'"),
        (written(kv="kv"), TypeError, "kv is str"),
        (written(k=None), TypeError, "k is NoneType"),
        (written(v=ROWS[:, :1]), ValueError, r"v \[1, 1, 3, 32\]"),
        (written(k=ROWS[..., :16], v=ROWS[..., :16]), ValueError, "k is"),
        (written(k=ROWS.half(), v=ROWS.half()), ValueError, "k is torch.float16"),
        (written(k=ROWS.half()), ValueError, "k is torch.float16"),
        (written(v=ROWS[..., :1].expand(1, 2, 3, 32)), ValueError, "strides 1 and 0"),
        (written(table=TABLE.long()), ValueError, "block_table is torch.int64"),
        (written(table=TABLE[0]), ValueError, r"block_table is \[2\]"),
        (written(at=TABLE[0]), ValueError, r"start_pos is \[2\]"),
        (written(at=3), TypeError, "start_pos is int"),
        (written(of=summary("hadamard2", 1)), ValueError, "hadamard2"),
        (written(of=summary("mean", 1, 2, 4, 16)), ValueError, "summary.data is"),
        (written(of=summary("vmax", 1, 2)), ValueError, "summary.data is"),
        (written(of=summary("vmax", 1, 2, 4, page=16)), ValueError, "summary has pages of 16"),
        (written(of=[ROWS]), TypeError, "summary is Tensor"),
        (lambda: pack_pages(INT8), ValueError, "kv has int8 pages"),
        (lambda: pack_pages(KVPages.empty(1, 1, 32, dtype=torch.float16)), ValueError, "kv is torch.float16"),
        (lambda: unpack_pages(KV), ValueError, "kv has format 'paged'"),
        (lambda: copy_pages(KV, INT8, IDS), ValueError, "src has format 'paged'"),
        (lambda: copy_pages(KV, KVPages.empty(4, 2, 32), IDS), ValueError, "src is torch.float32"),
        (lambda: copy_pages(KV, KVPages.empty(4, 1, 32), IDS), ValueError, "src has n_kv_heads 2"),
        (lambda: copy_pages(KV, replace(KV, page_valid=AT), IDS), ValueError, "page_valid"),
        (lambda: copy_pages(KV, KV, IDS[0]), ValueError, "ids is"),
        (lambda: copy_pages(KV, KV, IDS.long()), ValueError, "ids is torch.int64"),
        (lambda: copy_pages(KV, KV, IDS), IndexError, "reads and writes page 0"),
        (lambda: copy_pages(KV, KV, IDS + 4), IndexError, r"ids\[0, 0\] is 4: src has 4 pages"),
        (lambda: copy_pages(KV, KV, IDS - 1), IndexError, r"ids\[0, 0\] is -1"),
        (lambda: copy_pages(KV, KV, torch.tensor([[0, 1], [2, 1]]).int()), IndexError, "twice"),
    ],
)
def test_what_does_not_fit_is_named(call, error, named):
    with pytest.raises(error, match=named):
        call()


def test_nothing_to_write_or_copy_is_legal():
    write_kv(KV, ROWS[:, :, :0], ROWS[:, :, :0], TABLE, AT)
    write_kv(KV, ROWS[:0], ROWS[:0], TABLE[:0], AT[:0])
    copy_pages(KV, KV, IDS[:0])
    assert not bool(KV.k.any())
