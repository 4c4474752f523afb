"""The union of attentions in Triton's interpreter, in two program orders."""

from __future__ import annotations

import drawn
import pytest
import torch
from triton_cases import both_orders

from agentctx.kernels.merge import merge_lse
from agentctx.kernels.records import Attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def part(seed: int, size: int, dtype: torch.dtype, spread: float, empty: float = 0.3) -> Attention:
    """Random partial results of [2, 3, 2] rows; a share `empty` of them saw no key."""
    generator = torch.Generator().manual_seed(seed)
    lse = torch.randn(2, 3, 2, generator=generator) * spread
    lse[torch.rand(2, 3, 2, generator=generator) < empty] = -torch.inf
    out = torch.randn(2, 3, 2, size, generator=generator)
    return Attention(out.masked_fill(lse[..., None] == -torch.inf, 0).to(dtype), lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "count", "spread"), ((1, 2, 3.0), (80, 3, 1e4), (64, 1, 1.0), (300, 5, 0.1))
)
def test_agrees(dtype: torch.dtype, size: int, count: int, spread: float) -> None:
    parts = [part(seed, size, DTYPES[seed % 3] if seed else dtype, spread) for seed in range(count)]
    for out_dtype in (None, torch.float32):
        want = merge_lse(parts, out_dtype=torch.float32, impl="reference")
        for got in both_orders(lambda wanted=out_dtype: merge_lse(parts, out_dtype=wanted, impl="triton")):
            assert got.out.dtype == (out_dtype or dtype)
            drawn.assert_close(got, want, got.out.dtype)


def test_parts_without_keys_count_nothing() -> None:
    """Even a NaN in their out, which nobody wrote."""
    a, nothing = part(1, 64, torch.float32, 3.0, 0.0), part(2, 64, torch.float32, 3.0, 1.1)
    garbage = Attention(torch.full_like(a.out, torch.nan), nothing.lse)
    for parts in ([garbage, a], [nothing, a, garbage]):
        for got in both_orders(lambda given=parts: merge_lse(given, impl="triton")):
            drawn.assert_close(got, a, torch.float32)
    for parts in ([garbage], [nothing, garbage]):
        for got in both_orders(lambda given=parts: merge_lse(given, impl="triton")):
            assert not got.out.any() and bool((got.lse == -torch.inf).all())


def test_nan_propagates() -> None:
    for first in (True, False):
        a, b = part(1, 64, torch.float32, 3.0, 0.0), part(2, 64, torch.float32, 3.0, 0.0)
        a.lse[0, 0, 0] = torch.nan
        a.out[1, 1, 1, 5] = torch.nan
        parts = [a, b] if first else [b, a]
        for out, lse in both_orders(lambda given=parts: merge_lse(given, impl="triton")):
            assert bool(lse[0, 0, 0].isnan()) and bool(out[0, 0, 0].isnan().all())
            assert bool(out[1, 1, 1, 5].isnan()) and not bool(lse[1, 1, 1].isnan())
            assert int(lse.isnan().sum()) == 1 and int(out.isnan().sum()) == 64 + 1


def test_strides_do_not_matter() -> None:
    a, b = part(1, 64, torch.float32, 3.0), part(2, 64, torch.float32, 3.0)
    turned = Attention(a.out.transpose(1, 2).contiguous().transpose(1, 2), a.lse.mT.contiguous().mT)
    assert not turned.out.is_contiguous()
    want = merge_lse([a, b], impl="reference")
    for got in both_orders(lambda: merge_lse([turned, b], impl="triton")):
        drawn.assert_close(got, want, torch.float32)
