"""merge_lse: every implementation against the float64 reference, and what a union must satisfy."""

from __future__ import annotations

from typing import Any

import drawn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentctx.kernels.errors import KernelUnavailable
from agentctx.kernels.merge import merge_lse
from agentctx.kernels.records import Attention

quick = settings(max_examples=40, deadline=None, derandomize=True)
every = pytest.mark.parametrize("impl", drawn.implementations("merge_lse"))
both = pytest.mark.parametrize("impl", ["reference", *drawn.implementations("merge_lse")])


def part(
    seed: int,
    *,
    shape: tuple[int, int, int, int] = (2, 3, 2, 64),
    dtype: torch.dtype = torch.float32,
    spread: float = 3.0,
    empty: float = 0.0,
) -> Attention:
    """Random partial results; a share `empty` of the rows saw no key."""
    generator = torch.Generator().manual_seed(seed)
    lse = torch.randn(shape[:3], generator=generator) * spread
    lse[torch.rand(shape[:3], generator=generator) < empty] = -torch.inf
    out = torch.randn(shape, generator=generator)
    return Attention(out.masked_fill(lse[..., None] == -torch.inf, 0).to(dtype), lse)


@every
@quick
@given(data=st.data())
def test_agrees(impl: str, data: Any) -> None:
    shape = tuple(data.draw(st.integers(1, 4)) for _ in range(3))
    size = data.draw(st.sampled_from((1, 8, 33, 64, 80, 256)))
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    spread = data.draw(st.sampled_from((1e-3, 3.0, 200.0, 1e4)))
    parts = [
        part(seed, shape=(*shape, size), dtype=data.draw(st.sampled_from(dtypes)), spread=spread, empty=0.3)
        for seed in range(data.draw(st.integers(1, 5)))
    ]
    out_dtype = data.draw(st.sampled_from((None, *dtypes)))
    halves = torch.float16 in (out_dtype, *(p.out.dtype for p in parts))
    try:
        with drawn.poisoned():
            got = merge_lse(parts, out_dtype=out_dtype, impl=impl)
    except KernelUnavailable:
        assert halves and impl.startswith("cpp")
        return
    want = merge_lse(parts, out_dtype=torch.float32, impl="reference")
    assert got.out.dtype == (out_dtype or parts[0].out.dtype)
    drawn.assert_close(got, want, got.out.dtype)


@both
def test_it_is_attention_over_the_union(impl: str) -> None:
    generator = torch.Generator().manual_seed(5)
    scores, v = torch.randn(60, generator=generator) * 4, torch.randn(60, 32, generator=generator)
    cuts = (slice(0, 7), slice(7, 50), slice(50, 60))
    parts = [
        Attention((scores[c].softmax(0) @ v[c]).view(1, 1, 1, 32), scores[c].logsumexp(0).view(1, 1, 1))
        for c in cuts
    ]
    out, lse = merge_lse(parts, impl=impl)
    assert drawn.relative(out[0, 0, 0], scores.double().softmax(0) @ v.double()) < 1e-6
    assert abs(float(lse) - float(scores.double().logsumexp(0))) < 1e-5


@both
def test_order_and_grouping_do_not_matter(impl: str) -> None:
    a, b, c = (part(seed, empty=0.3) for seed in range(3))

    def merge(*parts: Attention) -> Attention:
        return merge_lse(parts, impl=impl)

    whole = merge(a, b, c)
    for other in (merge(c, a, b), merge(merge(a, b), c), merge(a, merge(b, c))):
        drawn.assert_close(other, whole, torch.float32)


@both
def test_parts_without_keys_count_nothing(impl: str) -> None:
    """Even a NaN in their out, which nobody wrote."""
    a, nothing = part(1), part(2, empty=1.1)
    garbage = Attention(torch.full_like(a.out, torch.nan), nothing.lse)
    for parts in ([a, nothing], [garbage, a], [nothing, a, garbage]):
        drawn.assert_close(merge_lse(parts, impl=impl), a, torch.float32)
    for parts in ([nothing], [garbage], [nothing, garbage]):
        out, lse = merge_lse(parts, impl=impl)
        assert not out.any() and bool((lse == -torch.inf).all())


@both
def test_nan_propagates(impl: str) -> None:
    for first in (True, False):
        a, b = part(1), part(2)
        a.lse[0, 0, 0] = torch.nan
        a.out[1, 1, 1, 5] = torch.nan
        out, lse = merge_lse([a, b] if first else [b, a], impl=impl)
        assert bool(lse[0, 0, 0].isnan()) and bool(out[0, 0, 0].isnan().all())
        assert bool(out[1, 1, 1, 5].isnan()) and not bool(lse[1, 1, 1].isnan())
        assert int(lse.isnan().sum()) == 1 and int(out.isnan().sum()) == 64 + 1


@both
def test_strides_do_not_matter(impl: str) -> None:
    a, b = part(1), part(2)
    turned = Attention(a.out.transpose(1, 2).contiguous().transpose(1, 2), a.lse.mT.contiguous().mT)
    assert not turned.out.is_contiguous()
    drawn.assert_close(merge_lse([turned, b], impl=impl), merge_lse([a, b], impl=impl), torch.float32)


@pytest.mark.parametrize("impl", [x for x in drawn.implementations("merge_lse") if x.startswith("cpp")])
def test_one_and_two_threads_give_the_same_bits(impl: str) -> None:
    parts = [part(seed, shape=(3, 7, 5, 96), dtype=torch.bfloat16) for seed in range(4)]
    found = []
    for count in (1, 2):
        with drawn.threads(count):
            found.append(merge_lse(parts, out_dtype=torch.float32, impl=impl))
    assert torch.equal(found[0].out, found[1].out) and torch.equal(found[0].lse, found[1].lse)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_the_result_is_where_the_first_part_is() -> None:
    a, b = part(1), part(2)
    there = Attention(*(x.cuda() for x in b))
    want = merge_lse([a, b], impl="reference")
    for parts, device in (([a, there], "cpu"), ([there, a], "cuda")):
        got = merge_lse(parts)
        assert got.out.device.type == device
        drawn.assert_close(Attention(*(x.cpu() for x in got)), want, torch.float32)


def test_bad_input_names_the_part() -> None:
    a = part(1)
    bad: list[tuple[Any, str, type[Exception]]] = [
        ([], "parts is empty", ValueError),
        ([a, tuple(a)], r"parts\[1\] is tuple", TypeError),
        ([Attention(a.out[0], a.lse[0])], r"parts\[0\].out is", ValueError),
        ([Attention(a.out.double(), a.lse)], r"parts\[0\].out is torch.float64", ValueError),
        ([a, Attention(a.out[:1], a.lse[:1])], r"parts\[1\] has out \[1", ValueError),
        ([a, Attention(a.out, a.lse.double())], r"parts\[1\] has .*float64", ValueError),
        ([Attention(a.out, a.lse[..., :1])], r"parts\[0\] has", ValueError),
    ]
    for parts, words, error in bad:
        with pytest.raises(error, match=words):
            merge_lse(parts)
    with pytest.raises(ValueError, match="out_dtype"):
        merge_lse([a], out_dtype=torch.float64)
