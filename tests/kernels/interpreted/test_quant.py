"""Quantisation in the interpreter: the codes and scales of the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from test_quant import assert_same
from triton_cases import both_orders

from agentctx.kernels.quant import dequantize_pages, quantize_pages


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("dtype", "size", "page"), [(torch.float32, 34, 16), (torch.bfloat16, 64, 64)])
def test_there_and_back(bits: int, dtype: torch.dtype, size: int, page: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(2, page, 2, size, generator=generator) * torch.exp(
        3 * torch.randn(size, generator=generator)
    )
    x[..., 3] = 0
    x[..., 4] *= 1e-41
    k, v = x.to(dtype).transpose(1, 2), x.flip(0).to(dtype).transpose(1, 2)
    want = quantize_pages(k, v, bits, impl="reference")
    for got in both_orders(lambda: quantize_pages(k, v, bits, impl="triton")):
        assert_same(got, want)
    ids = torch.tensor([1, 0, 1], dtype=torch.int32)
    plain = dequantize_pages(want, ids, torch.float32, impl="reference")
    for back in both_orders(lambda: dequantize_pages(want, ids, torch.float32, impl="triton")):
        assert torch.equal(back[0], plain[0]) and torch.equal(back[1], plain[1])
