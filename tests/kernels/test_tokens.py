"""token_decode and pseudo_attention: every implementation against the float64 reference."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import drawn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentctx.kernels.decode import dense_decode
from agentctx.kernels.errors import KernelUnavailable
from agentctx.kernels.merge import merge_lse
from agentctx.kernels.records import Attention
from agentctx.kernels.tokens import pseudo_attention, token_decode

quick = settings(max_examples=25, deadline=None, derandomize=True)
every = pytest.mark.parametrize("impl", drawn.implementations("token_decode"))
cpp = pytest.mark.parametrize(
    "impl", [x for x in drawn.implementations("token_decode") if x.startswith("cpp")]
)
FORMATS = ("paged", "packed", "int8", "int4")


def listed(case: drawn.Case, slots: int, *, all: bool = False) -> tuple[Tensor, Tensor]:
    """Random tokens of each sequence for each KV head, ragged; or all of them. Unused slots are hostile."""
    batch, heads, page = len(case.lens), case.kv.n_kv_heads, case.kv.page_tokens
    tokens = torch.full((batch, heads, slots), drawn.UNUSED, dtype=torch.int32)
    counts = torch.zeros(batch, heads, dtype=torch.int32)
    for b, length in enumerate(case.lens.tolist()):
        for h in range(heads):
            position = torch.randperm(length, generator=case.generator)[:slots]
            if not all:
                keep = int(torch.randint(0, len(position) + 1, (), generator=case.generator))
                position = position[:keep]
            tokens[b, h, : len(position)] = case.table[b, position // page] * page + position % page
            counts[b, h] = len(position)
    return tokens, counts


@every
@quick
@given(data=st.data())
def test_tokens_agree(impl: str, data: Any) -> None:
    format = data.draw(st.sampled_from(FORMATS))
    dtypes = (torch.float32, torch.bfloat16) + ((torch.float16,) if format != "packed" else ())
    case = data.draw(drawn.cases(dtypes=dtypes, formats=(format,), sizes=(32, 40, 64, 80, 256)))
    tokens, counts = listed(case, data.draw(st.sampled_from((0, 1, 7, 64, 200))))
    options = {
        "softcap": data.draw(st.sampled_from((0.0, 5.0))),
        "scale": data.draw(st.sampled_from((None, 0.05))),
    }
    out_dtype = data.draw(st.sampled_from((None, torch.float32)))
    call: tuple[Any, ...] = (case.q, case.kv, tokens, counts)
    try:
        with drawn.poisoned():
            got = token_decode(*call, impl=impl, out_dtype=out_dtype, validate=True, **options)
    except KernelUnavailable:
        assert impl.startswith("cpp") or impl == "triton"
        assert case.kv.format != "paged" or case.q.dtype == torch.float16 or case.q.shape[3] % 16
        return
    assert got.out.dtype == (out_dtype or case.q.dtype)
    want = token_decode(*call, impl="reference", out_dtype=torch.float32, **options)
    drawn.assert_close(got, want, case.q.dtype, largest=case.largest())


def keys(
    seed: int,
    *,
    batch: int = 2,
    heads: int = 2,
    group: int = 3,
    rows: int = 2,
    slots: int = 100,
    size: int = 64,
    dtype: torch.dtype = torch.float32,
    magnitude: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and log weights, a third of them -inf."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q = noise(batch, heads * group, rows, size) * magnitude
    k, v = noise(batch, heads, slots, size) * magnitude, noise(batch, heads, slots, size)
    weight = noise(batch, heads, slots) * 3
    weight[torch.rand(weight.shape, generator=generator) < 0.3] = -torch.inf
    return q.to(dtype), k.to(dtype), v.to(dtype), weight


@every
@quick
@given(data=st.data())
def test_pseudo_keys_agree(impl: str, data: Any) -> None:
    draw = data.draw
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    size = draw(st.sampled_from((16, 40, 64, 80, 256)))
    given = keys(
        draw(st.integers(0, 1000)),
        heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 8)),
        rows=draw(st.integers(1, 4)),
        slots=draw(st.sampled_from((0, 1, 63, 64, 65, 200))),
        size=size,
        dtype=dtype,
        magnitude=draw(st.sampled_from((1e-10, 1.0, 8.0))),
    )
    if draw(st.booleans()):
        given[3][0] = -torch.inf
    options = {"softcap": draw(st.sampled_from((0.0, 5.0, 50.0)))}
    try:
        with drawn.poisoned():
            got = pseudo_attention(*given, impl=impl, **options)
    except KernelUnavailable:
        assert size % 16 or (dtype == torch.float16 and impl.startswith("cpp"))
        return
    want = pseudo_attention(*given, impl="reference", out_dtype=torch.float32, **options)
    drawn.assert_close(got, want, dtype)


@every
@pytest.mark.parametrize("format", ("paged", "packed"))
def test_all_tokens_in_any_order_are_dense(impl: str, format: str) -> None:
    """Also of lists that are cut into several parts."""
    if impl == "triton" and format == "packed":
        pytest.skip("packed pages belong to the CPU")
    case = drawn.make(lens=[2500, 1024, 1], batch=3, kv_heads=2, group=3, format=format)
    got = token_decode(case.q, case.kv, *listed(case, 2500, all=True), impl=impl)
    drawn.assert_close(
        got, dense_decode(case.q, case.kv, case.table, case.lens, impl="reference"), torch.float32
    )


@every
def test_a_cluster_of_equal_keys_is_one_key_with_the_log_of_their_number(impl: str) -> None:
    q, k, v, _ = keys(3, slots=9)
    sizes = torch.tensor([1, 5, 2, 7, 1, 1, 30, 4, 2])
    weight = sizes.float().log().expand(2, 2, 9)
    got = pseudo_attention(q, k, v, weight, softcap=20.0, impl=impl)
    each = (x.repeat_interleave(sizes, 2) for x in (k, v))
    want = pseudo_attention(q, *each, torch.zeros(2, 2, int(sizes.sum())), softcap=20.0, impl="reference")
    drawn.assert_close(got, want, torch.float32)


@every
def test_parts_merge_to_the_whole(impl: str) -> None:
    q, k, v, weight = keys(4, dtype=torch.bfloat16)
    parts = [
        pseudo_attention(q, k[:, :, c], v[:, :, c], weight[:, :, c], out_dtype=torch.float32, impl=impl)
        for c in (slice(0, 30), slice(30, 31), slice(31, 100))
    ]
    want = pseudo_attention(q, k, v, weight, out_dtype=torch.float32, impl="reference")
    drawn.assert_close(merge_lse(parts), want, torch.bfloat16)


@every
def test_strides_do_not_matter(impl: str) -> None:
    q, k, v, weight = keys(5)
    k2, v2 = torch.stack([k, v], 3).unbind(3)
    q2 = q.transpose(1, 2).contiguous().transpose(1, 2)
    weight2 = weight.mT.contiguous().mT
    assert not (k2.is_contiguous() or q2.is_contiguous() or weight2.is_contiguous())
    got = pseudo_attention(q2, k2, v2, weight2, impl=impl)
    drawn.assert_close(got, pseudo_attention(q, k, v, weight, impl="reference"), torch.float32)


@every
@pytest.mark.parametrize("magnitude", (1e-20, 30.0, 1000.0))
def test_extreme_magnitudes(impl: str, magnitude: float) -> None:
    given = keys(6, magnitude=magnitude, dtype=torch.bfloat16)
    want = pseudo_attention(*given, out_dtype=torch.float32, impl="reference")
    drawn.assert_close(pseudo_attention(*given, impl=impl), want, torch.bfloat16)


@cpp
def test_one_and_two_threads_give_the_same_bits(impl: str) -> None:
    case = drawn.make(lens=[3000, 700], batch=2, kv_heads=3, group=3, dtype=torch.bfloat16)
    tokens, counts = listed(case, 2500, all=True)
    given = keys(7, slots=2100)
    found = []
    for count in (1, 2):
        with drawn.threads(count):
            found.append(token_decode(case.q, case.kv, tokens, counts, impl=impl))
            found.append(pseudo_attention(*given, impl=impl))
    for a, b in ((found[0], found[2]), (found[1], found[3])):
        assert torch.equal(a.out, b.out) and torch.equal(a.lse, b.lse)


@every
def test_calls_from_several_threads(impl: str) -> None:
    given = [keys(seed, slots=300) for seed in range(4)]

    def repeat(i: int) -> Attention:
        return [pseudo_attention(*given[i], impl=impl) for _ in range(10)][-1]

    with ThreadPoolExecutor(4) as pool:
        for i, got in enumerate(pool.map(repeat, range(4))):
            drawn.assert_close(got, pseudo_attention(*given[i], impl="reference"), torch.float32)


@pytest.mark.parametrize("impl", ["reference", *drawn.implementations("token_decode")])
@pytest.mark.parametrize("token", (-1, 10**6, 2**31 - 1))
def test_a_token_outside_the_pool_is_an_index_error(impl: str, token: int) -> None:
    if impl == "triton":
        pytest.skip("a GPU does not check without validate")
    case = drawn.make(lens=[130], kv_heads=2)
    tokens, counts = listed(case, 40, all=True)
    tokens[0, 1, 39] = token
    for validate in (False, True):
        with pytest.raises(IndexError, match="token|page"):
            token_decode(case.q, case.kv, tokens, counts, impl=impl, validate=validate)


@cpp
def test_a_count_beyond_the_list_never_reads_past_it(impl: str) -> None:
    case = drawn.make(lens=[130])
    tokens, counts = listed(case, 40, all=True)
    with pytest.raises(IndexError, match=r"counts\[0, 0\] is 41"):
        token_decode(case.q, case.kv, tokens, counts + 1, impl=impl)


def test_bad_input_names_the_argument() -> None:
    case = drawn.make(lens=[130], kv_heads=2, group=2)
    tokens, counts = listed(case, 10, all=True)

    def refused(words: str, **change: Any) -> None:
        given = {"q": case.q, "kv": case.kv, "tokens": tokens, "counts": counts} | change
        with pytest.raises(ValueError, match=words):
            token_decode(**given)

    refused("q is", q=case.q[0])
    refused("tokens is torch.int64", tokens=tokens.long())
    refused("tokens is", tokens=tokens[:, :1])
    refused("counts is", counts=counts[0])
    refused("softcap is", softcap=-1.0)
    refused("out_dtype is", out_dtype=torch.int8)
    with pytest.raises(IndexError, match=r"counts\[0, 0\] is 11"):
        token_decode(case.q, case.kv, tokens, counts + 1, validate=True)

    q, k, v, weight = keys(1)

    def also_refused(words: str, **change: Any) -> None:
        with pytest.raises(ValueError, match=words):
            pseudo_attention(**({"q": q, "k": k, "v": v, "log_weight": weight} | change))

    also_refused("q is", q=q[0])
    also_refused("q has 5 heads", q=q[:, :5])
    also_refused("k is torch.bfloat16", k=k.bfloat16())
    also_refused("v is", v=v[:, :, :5])
    also_refused("v has stride", v=v.mT.contiguous().mT)
    also_refused("log_weight is", log_weight=weight.double())
    also_refused("log_weight is", log_weight=weight[..., 0])
    also_refused("scale|softcap", softcap=-2.0)
