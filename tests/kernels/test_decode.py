"""dense_decode and sparse_decode: every implementation against the float64 reference."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import drawn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentctx.kernels.decode import dense_decode, sparse_decode
from agentctx.kernels.errors import KernelUnavailable
from agentctx.kernels.merge import merge_lse
from agentctx.kernels.records import Attention, BlockSelection, KVPages

quick = settings(max_examples=25, deadline=None, derandomize=True)
every = pytest.mark.parametrize("impl", drawn.implementations("sparse_decode"))
FORMATS = ("paged", "packed", "int8", "int4")


@st.composite
def problems(draw: st.DrawFn) -> tuple[drawn.Case, dict[str, Any]]:
    """A case of any format and options of any kind."""
    format = draw(st.sampled_from(FORMATS))
    quantised = format in ("int8", "int4")
    dtypes = (torch.float32, torch.bfloat16) + ((torch.float16,) if format != "packed" else ())
    magnitudes = (1.0, 1e-3) if quantised else (1.0, 1e-3, 8.0)
    case = draw(drawn.cases(dtypes=dtypes, formats=(format,), magnitudes=magnitudes))
    options: dict[str, Any] = {
        "softcap": draw(st.sampled_from((0.0, 0.0, 5.0))),
        "scale": draw(st.sampled_from((None, 0.05))),
        "splits": draw(st.sampled_from((None, 1, 3))),
        "out_dtype": draw(st.sampled_from((None, torch.float32))),
    }
    if draw(st.booleans()):
        first = [draw(st.integers(0, int(n) + 1)) for n in case.lens]
        options |= {"first_pos": ints(first), "sink_tokens": draw(st.integers(0, 20))}
    if quantised and draw(st.booleans()):
        options["tail"] = case.tail
    elif draw(st.booleans()):
        case = replace(case, kv=replace(case.kv, page_valid=validity(case)))
    return case, options


def ints(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def validity(case: drawn.Case) -> Tensor:
    """For about half the pages some number of tokens that were written, for the others -1."""
    page = case.kv.page_tokens
    valid = torch.full((case.kv.n_pages,), -1, dtype=torch.int32)
    for b, length in enumerate(case.lens.tolist()):
        for j in range(int(case.blocks[b])):
            if torch.rand((), generator=case.generator) < 0.5:
                real = min(page, length - j * page)
                valid[case.table[b, j]] = torch.randint(0, real + 1, (), generator=case.generator)
    return valid


def covered(impl: str, case: drawn.Case) -> bool:
    """C++ may leave to torch what its limits name: other pages, float16, odd head sizes."""
    if impl == "triton":
        return case.kv.format != "packed"  # those belong to the CPU
    step = 32 if case.kv.format == "int4" else 16
    plain = case.kv.page_tokens == 64 and case.q.dtype != torch.float16 and case.q.shape[3] % step == 0
    return plain or not impl.startswith("cpp")


def check(impl: str, case: drawn.Case, lists: BlockSelection | None, **options: Any) -> None:
    """The implementation agrees with the reference, or says that it does not serve what it need not."""

    def call(impl: str, **more: Any) -> Attention:
        every = options | more | {"impl": impl, "validate": True}
        if lists is None:
            return dense_decode(case.q, case.kv, case.table, case.lens, **every)
        return sparse_decode(case.q, case.kv, lists, case.lens, **every)

    try:
        with drawn.poisoned():
            got = call(impl)
    except KernelUnavailable:
        assert not covered(impl, case)
        return
    assert got.out.dtype == (options.get("out_dtype") or case.q.dtype)
    want = call("reference", out_dtype=torch.float32)
    largest = case.largest(options.get("scale"))
    drawn.assert_close(got, want, case.q.dtype, quantised=case.kv.quantised, largest=largest)


@every
@quick
@given(problem=problems())
def test_dense_agrees(impl: str, problem: tuple[drawn.Case, dict[str, Any]]) -> None:
    case, options = problem
    check(impl, case, None, **options)


@every
@quick
@given(problem=problems(), per_head=st.booleans(), density=st.sampled_from((0.0, 0.3, 0.7, 1.0)))
def test_sparse_agrees(
    impl: str, problem: tuple[drawn.Case, dict[str, Any]], per_head: bool, density: float
) -> None:
    case, options = problem
    heads = case.q.shape[1] if per_head else case.kv.n_kv_heads
    check(impl, case, case.selection(heads=heads, density=density), **options)


@every
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_every_format_at_every_number_of_tokens(impl: str, format: str, dtype: torch.dtype) -> None:
    for rows in range(1, 5):
        case = drawn.make(
            lens=[rows, 64, 129], batch=3, kv_heads=2, group=3, rows=rows, dtype=dtype, format=format
        )
        check(impl, case, None, tail=case.tail)
        check(impl, case, case.selection())


@every
def test_contexts_shorter_than_the_query(impl: str) -> None:
    """Rows before the first token see nothing."""
    case = drawn.make(lens=[0, 1, 2], batch=3, group=2, rows=4)
    for call in (dense_decode, sparse_decode):
        lists: Any = case.table if call is dense_decode else case.selection(density=1.0)
        out, lse = call(case.q, case.kv, lists, case.lens, impl=impl)
        assert (lse == -torch.inf).sum(-1).tolist() == [[4, 4], [3, 3], [2, 2]]
        assert not out[lse == -torch.inf].any() and out[lse > -torch.inf].any(-1).all()
    check(impl, case, None)


@every
def test_a_long_context_behind_a_window(impl: str) -> None:
    """Whole blocks are hidden: the first tokens of the list, then nearly all."""
    case = drawn.make(lens=[3000, 1500], batch=2, kv_heads=2, group=4, dtype=torch.bfloat16)
    for first, sinks in (([2990, 1499], 0), ([2990, 1499], 4), ([3000, 1500], 0), ([3000, 1500], 70)):
        check(impl, case, None, first_pos=ints(first), sink_tokens=sinks)
        check(impl, case, case.selection(), first_pos=ints(first), sink_tokens=sinks)


@every
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_all_blocks_are_dense(impl: str, dtype: torch.dtype) -> None:
    case = drawn.make(lens=[300, 64, 0], batch=3, kv_heads=2, group=3, rows=2, dtype=dtype)
    dense = dense_decode(case.q, case.kv, case.table, case.lens, out_dtype=torch.float32, impl=impl)
    for heads in (2, 6):
        lists = case.selection(heads=heads, density=1.0)
        sparse = sparse_decode(case.q, case.kv, lists, case.lens, out_dtype=torch.float32, impl=impl)
        drawn.assert_close(sparse, dense, dtype)


@every
def test_two_halves_merge_to_the_whole(impl: str) -> None:
    case = drawn.make(lens=[640, 70], batch=2, kv_heads=2, group=3, dtype=torch.bfloat16)
    lists = case.selection(density=1.0)
    odd = torch.where(lists.counts[..., None] > 0, lists.pages, 0)

    def half(start: int) -> Attention:
        counts = (lists.counts + 1 - start) // 2
        part = BlockSelection(
            odd[..., start::2].contiguous(), lists.blocks[..., start::2].contiguous(), counts
        )
        return sparse_decode(case.q, case.kv, part, case.lens, out_dtype=torch.float32, impl=impl)

    whole = dense_decode(case.q, case.kv, case.table, case.lens, out_dtype=torch.float32, impl="reference")
    drawn.assert_close(merge_lse([half(0), half(1)]), whole, torch.bfloat16)


@every
def test_the_order_of_a_list_does_not_matter(impl: str) -> None:
    case = drawn.make(lens=[300, 200], batch=2, kv_heads=2, group=3)
    lists = case.selection(density=1.0)
    count = int(lists.counts.min())
    order = torch.randperm(count, generator=case.generator)
    cut = [x[..., :count] for x in lists[:2]]
    shuffled = BlockSelection(*(x[..., order].contiguous() for x in cut), torch.full((2, 2), count).int())
    straight = BlockSelection(*(x.contiguous() for x in cut), shuffled.counts)
    a = sparse_decode(case.q, case.kv, shuffled, case.lens, impl=impl)
    b = sparse_decode(case.q, case.kv, straight, case.lens, impl="reference")
    drawn.assert_close(a, b, torch.float32)


@every
def test_a_learned_sink_is_a_factor(impl: str) -> None:
    """`out * sigmoid(lse - sink)` is attention with one more logit whose value is 0."""
    case = drawn.make(lens=[130], kv_heads=2, group=2, rows=2)
    sink = torch.tensor([-3.0, 0.0, 2.0, 9.0], dtype=torch.float64)
    out, lse = dense_decode(case.q, case.kv, case.table, case.lens, impl=impl)
    got = out * torch.sigmoid(lse - sink.float()[:, None])[..., None]
    k = case.k[:, :, :130].double().repeat_interleave(2, 1)
    v = case.v[:, :, :130].double().repeat_interleave(2, 1)
    scores = case.q.double() @ k.transpose(2, 3) * case.q.shape[3] ** -0.5
    scores[:, :, 0, 129] = -torch.inf  # the second token's own key
    logits = torch.cat([scores, sink.view(1, 4, 1, 1).expand(1, 4, 2, 1)], -1)
    assert drawn.relative(got, logits.softmax(-1)[..., :130] @ v) < 1e-5


@every
@pytest.mark.parametrize("magnitude", (1e-20, 1e-6, 30.0, 1000.0))
def test_extreme_magnitudes(impl: str, magnitude: float) -> None:
    """Scores from 1e-40 to 1e6: no overflow, no NaN; one key wins where they are huge."""
    for dtype in (torch.float32, torch.bfloat16):
        case = drawn.make(lens=[200], kv_heads=2, group=3, magnitude=magnitude, dtype=dtype)
        check(impl, case, None)


@every
def test_the_ragged_pool_view(impl: str) -> None:
    """Heads of different lengths: pages of single heads, head stride 0, `page_valid` for each tile."""
    case = drawn.make(lens=[256], kv_heads=3, group=2, dtype=torch.bfloat16)
    pool = case.kv
    tiles = pool.n_pages * 3

    def ragged(x: Tensor) -> Tensor:
        return x.reshape(tiles, 1, 64, 64).expand(tiles, 3, 64, 64)

    valid = torch.randint(0, 65, (tiles,), generator=case.generator, dtype=torch.int32)
    valid[torch.rand(tiles, generator=case.generator) < 0.3] = 64
    kv = KVPages(ragged(pool.k), ragged(pool.v), 64, 64, page_valid=valid)
    blocks = torch.arange(4, dtype=torch.int32).repeat(1, 3, 1)
    pages = case.table[:, None, :4] * 3 + ints([0, 1, 2])[:, None]
    lists = BlockSelection(pages, blocks, ints([[4, 0, 3]]))
    got = sparse_decode(case.q, kv, lists, case.lens, impl=impl, validate=True)
    want = sparse_decode(case.q, kv, lists, case.lens, impl="reference", out_dtype=torch.float32)
    drawn.assert_close(got, want, torch.bfloat16)
    for head, own in enumerate(pages[0]):
        keys = [pool.k[int(t) // 3, head, : int(valid[t])] for t in own[: int(lists.counts[0, head])]]
        scores = case.q[0, 2 * head].double() @ torch.cat([*keys, pool.k[0, 0, :0]]).double().T / 8
        assert torch.allclose(got.lse[0, 2 * head].double(), scores.logsumexp(-1), atol=1e-3)


@every
def test_strides(impl: str) -> None:
    """Queries out of a wider tensor, pools over keys that lie head by head or are part of a larger one."""
    case = drawn.make(lens=[192], kv_heads=2, group=3, rows=2)
    k, v = case.k[0], case.v[0]
    wide = torch.randn(1, 2, 6, 3 * 64, generator=case.generator)
    q = wide[..., 64:128].transpose(1, 2)
    table = torch.arange(3, dtype=torch.int32)[None]
    over = KVPages.over(k, v)
    deep = torch.stack([case.kv.k, case.kv.v], 2)  # [P, Hkv, 2, page, D]
    layers = KVPages(deep[:, :, 0], deep[:, :, 1], 64, 64)
    for kv, blocks in ((over, table), (layers, case.table)):
        got = dense_decode(q, kv, blocks, case.lens, impl=impl)
        want = dense_decode(q.contiguous(), case.kv, case.table, case.lens, impl="reference")
        drawn.assert_close(got, want, torch.float32)


@pytest.mark.parametrize("impl", [x for x in drawn.implementations("sparse_decode") if x.startswith("cpp")])
def test_one_and_two_threads_give_the_same_bits(impl: str) -> None:
    for format in FORMATS:
        case = drawn.make(lens=[3001, 400], batch=2, kv_heads=3, group=3, dtype=torch.bfloat16, format=format)
        lists = case.selection()
        found = []
        for count in (1, 2):
            with drawn.threads(count):
                found.append(dense_decode(case.q, case.kv, case.table, case.lens, impl=impl))
                found.append(sparse_decode(case.q, case.kv, lists, case.lens, impl=impl))
        for a, b in ((found[0], found[2]), (found[1], found[3])):
            assert torch.equal(a.out, b.out) and torch.equal(a.lse, b.lse)


@every
def test_calls_from_several_threads(impl: str) -> None:
    cases = [drawn.make(lens=[900 + i], kv_heads=2, group=3, seed=i) for i in range(4)]
    want = [dense_decode(c.q, c.kv, c.table, c.lens, impl="reference") for c in cases]

    def repeat(i: int) -> Attention:
        c = cases[i]
        return [dense_decode(c.q, c.kv, c.table, c.lens, impl=impl) for _ in range(10)][-1]

    with ThreadPoolExecutor(4) as pool:
        for got, right in zip(pool.map(repeat, range(4)), want, strict=True):
            drawn.assert_close(got, right, torch.float32)


@pytest.mark.parametrize("impl", ["reference", *drawn.implementations("sparse_decode")])
@pytest.mark.parametrize("page", (-1, 10**6, 2**31 - 1))
def test_a_page_outside_the_pool_is_an_index_error(impl: str, page: int) -> None:
    if impl == "triton":
        pytest.skip("a GPU does not check without validate")
    case = drawn.make(lens=[130], kv_heads=2)
    lists = case.selection(density=1.0)
    lists.pages[0, 1, 1] = page
    case.table[0, 1] = page
    for validate in (False, True):
        with pytest.raises(IndexError, match="page"):
            sparse_decode(case.q, case.kv, lists, case.lens, impl=impl, validate=validate)
        with pytest.raises(IndexError, match=r"page|block_table"):
            dense_decode(case.q, case.kv, case.table, case.lens, impl=impl, validate=validate)


def test_bad_input_names_the_argument() -> None:
    case = drawn.make(lens=[130, 64], batch=2, kv_heads=2, group=2)
    q, kv, table, lens, lists = case.q, case.kv, case.table, case.lens, case.selection()

    def refused(words: str, error: type[Exception] = ValueError, **change: Any) -> None:
        given = {"q": q, "kv": kv, "block_table": table, "context_lens": lens} | change
        with pytest.raises(error, match=words):
            dense_decode(**given)
        del given["block_table"]
        if "block_table" not in change:
            with pytest.raises(error, match=words):
                sparse_decode(**given, selection=lists)

    refused("q is", q=q[0])
    refused("q is list", TypeError, q=[1])
    refused("q is torch.float64", q=q.double())
    refused("q has stride", q=q.transpose(2, 3).contiguous().transpose(2, 3).expand(2, 4, 1, 64)[..., ::2])
    refused("heads", q=q[:, :3])
    refused("head size", q=q[..., :32])
    refused("kv torch.float32", q=q.bfloat16())
    refused("kv is", TypeError, kv=kv.k)
    refused("kv.v", kv=replace(kv, v=kv.v[:, :, :32]))
    refused("format", kv=replace(kv, format="other"))
    refused("block_table is torch.int64", block_table=table.long())
    refused("block_table is", block_table=table[:1])
    refused("context_lens is", context_lens=lens[:1])
    refused("first_pos is", first_pos=lens.long())
    refused("sink_tokens is -1", sink_tokens=-1)
    refused("softcap is -1", softcap=-1.0)
    refused("out_dtype is", out_dtype=torch.float64)
    refused("tail", tail=(q, q))
    refused("impl is", impl="other")
    for field in ("pages", "blocks", "counts"):
        with pytest.raises(ValueError, match=f"selection.{field}"):
            bad = lists._replace(**{field: getattr(lists, field).long()})
            sparse_decode(q, kv, bad, lens)
    with pytest.raises(IndexError, match=r"counts\[0, 1\] is 9"):
        lists.counts[0, 1] = 9
        sparse_decode(q, kv, lists, lens, validate=True)
    with pytest.raises(IndexError, match=r"context_lens\[1\] is 9999"):
        dense_decode(q, kv, table, ints([5, 9999]), validate=True)


@every
def test_full_lists_of_full_pages(impl: str) -> None:
    """Nothing is hidden, with and without the newest block in the list."""
    for rows in (1, 3):
        case = drawn.make(lens=[256, 256], batch=2, kv_heads=2, group=3, rows=rows, dtype=torch.bfloat16)
        full = case.selection(density=1.0)
        check(impl, case, full)
        check(impl, case, BlockSelection(*(x[..., :3].contiguous() for x in full[:2]), full.counts - 1))
        check(impl, case, full, softcap=5.0)
