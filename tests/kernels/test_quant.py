"""Quantised pages: the same codes and scales from every implementation, bounds, and exact repetition."""

from __future__ import annotations

from collections.abc import Iterator

import drawn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentctx.kernels.quant import dequantize_pages, quantize_pages
from agentctx.kernels.records import KVPages

IMPLEMENTATIONS = drawn.implementations("quantize_pages")
FIELDS = ("k", "v", "k_scale", "v_scale")


def every(kv: KVPages) -> Tensor:
    return torch.arange(kv.n_pages, dtype=torch.int32)


def assert_same(one: KVPages, other: KVPages) -> None:
    assert (one.format, one.page_tokens, one.head_dim) == (other.format, other.page_tokens, other.head_dim)
    for name in FIELDS:
        got, want = getattr(one, name), getattr(other, name)
        assert got.dtype == want.dtype and torch.equal(got, want), name


@st.composite
def pages(draw: st.DrawFn, sizes: tuple[int, ...] = (2, 6, 32, 34, 64)) -> tuple[Tensor, Tensor, int]:
    """K and V whose channels differ by orders of magnitude, some of zeros, some too small for a scale."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from((16, 64))))
    size, dtype = draw(st.sampled_from(sizes)), draw(st.sampled_from((torch.float32, torch.bfloat16)))
    found = []
    for _ in range(2):
        x = torch.randn(shape[0], shape[2], shape[1], size, generator=generator)
        x *= torch.exp(3 * torch.randn(size, generator=generator))
        x *= draw(st.sampled_from((1.0, 1e-35, 1e-37, 1e-41, 1e31)))
        x[..., int(torch.randint(size, (1,), generator=generator))] = 0
        found.append(x.to(dtype).transpose(1, 2))
    return found[0], found[1], draw(st.sampled_from((4, 8)))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(drawn_pages=pages())
def test_codes_and_scales_are_those_of_the_definition(impl, drawn_pages):
    k, v, bits = drawn_pages
    got = quantize_pages(k, v, bits, impl=impl)
    assert_same(got, quantize_pages(k, v, bits, impl="reference"))
    order = torch.randperm(got.n_pages, generator=torch.Generator().manual_seed(0)).int().repeat(2)
    for dtype in (torch.float32, torch.bfloat16):
        values = dequantize_pages(got, order, dtype, impl=impl)
        want = dequantize_pages(got, order, dtype, impl="reference")
        assert torch.equal(values[0], want[0]) and torch.equal(values[1], want[1])
        assert values[0].dtype == dtype and values[0].shape == (len(order), *k.shape[1:])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(drawn_pages=pages(sizes=(2, 64, 80, 256)))
def test_a_dequantised_page_gives_its_own_codes_again(impl, drawn_pages):
    k, v, bits = drawn_pages
    first = quantize_pages(k, v, bits, impl=impl)
    values = dequantize_pages(first, every(first), torch.float32, impl=impl)
    assert_same(quantize_pages(*values, bits, impl=impl), first)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("bits", "limit"), [(8, 127), (4, 7)])
def test_values_are_at_most_half_a_step_away(impl, bits, limit):
    generator = torch.Generator().manual_seed(7)
    k, v = (torch.randn(3, 2, 64, 128, generator=generator) for _ in range(2))
    kv = quantize_pages(k, v, bits, impl=impl)
    values = dequantize_pages(kv, every(kv), torch.float32, impl=impl)
    for x, y, scale in zip((k, v), values, (kv.k_scale, kv.v_scale), strict=True):
        step = scale.float().unsqueeze(2)
        # A scale that was rounded down clamps the largest value; bfloat16 rounds by 2**-8 at most.
        assert bool(((x - y).abs() <= step * max(0.5, limit * 2**-8) * 1.0001).all())
        assert bool((y.abs() <= step * limit).all())
        largest = (y.abs() / step).amax(2).round()
        assert bool((largest == limit).all()), "the largest value has the largest code"


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("bits", [4, 8])
def test_channels_of_zeros(impl, bits):
    zeros = torch.zeros(2, 1, 16, 32)
    kv = quantize_pages(zeros, zeros, bits, impl=impl)
    assert not any(bool(getattr(kv, name).any()) for name in FIELDS)
    assert not bool(dequantize_pages(kv, every(kv), torch.bfloat16, impl=impl)[0].any())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("wrong", [-1, 3, 2**31 - 1])
def test_a_page_outside_the_pool_is_refused(impl, wrong):
    kv = quantize_pages(torch.ones(3, 1, 16, 32), torch.ones(3, 1, 16, 32), 8)
    with pytest.raises(IndexError, match=rf"pages\[1\] is {wrong}: the pool has 3 pages"):
        dequantize_pages(kv, torch.tensor([0, wrong], dtype=torch.int32), torch.float32, impl=impl)


def test_half_precision_is_served_by_torch():
    k = torch.randn(1, 1, 16, 32, generator=torch.Generator().manual_seed(0)).half()
    kv = quantize_pages(k, k, 8)
    assert_same(kv, quantize_pages(k.float(), k.float(), 8))
    assert drawn.relative(dequantize_pages(kv, every(kv), torch.float16)[1], k) < 1e-2


@pytest.fixture
def team(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setattr("agentctx.kernels.threads.worth", lambda *_: torch.get_num_threads())
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("impl", [name for name in IMPLEMENTATIONS if name.startswith("cpp")])
def test_one_and_two_threads_agree(impl, team):
    k = torch.randn(5, 3, 64, 80, generator=torch.Generator().manual_seed(0))
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        kv = quantize_pages(k, k, 4, impl=impl)
        results.append((kv, dequantize_pages(kv, every(kv), torch.bfloat16, impl=impl)))
    assert_same(results[0][0], results[1][0])
    assert torch.equal(results[0][1][1], results[1][1][1])


K = torch.zeros(2, 1, 16, 32)
KV = quantize_pages(K, K, 8)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: quantize_pages(K, K, 5), ValueError, "bits is 5"),
        (lambda: quantize_pages(K[0], K, 8), ValueError, "k is"),
        (lambda: quantize_pages(None, K, 8), TypeError, "k is NoneType"),
        (lambda: quantize_pages(K.double(), K.double(), 8), ValueError, "k is torch.float64"),
        (lambda: quantize_pages(K, K.half(), 8), ValueError, "v torch.float16"),
        (lambda: quantize_pages(K, K[:1], 8), ValueError, r"v torch.float32 \[1, 1, 16, 32\]"),
        (lambda: quantize_pages(K[:, :, :5], K[:, :, :5], 8), ValueError, "pages of 5 tokens"),
        (lambda: quantize_pages(K[..., :5], K[..., :5], 4), ValueError, "even head size"),
        (lambda: quantize_pages(K, K[..., :1].expand_as(K), 8), ValueError, "v has stride 0"),
        (lambda: dequantize_pages(KVPages.empty(1, 1, 32), IDS, torch.float32), ValueError, "'paged'"),
        (lambda: dequantize_pages(KV, IDS.long(), torch.float32), ValueError, "pages is torch.int64"),
        (lambda: dequantize_pages(KV, IDS, torch.float64), ValueError, "dtype is torch.float64"),
    ],
)
def test_what_does_not_fit_is_named(call, error, named):
    with pytest.raises(error, match=named):
        call()


IDS = torch.zeros(1, dtype=torch.int32)
