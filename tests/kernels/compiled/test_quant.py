"""Quantisation, compiled."""

from __future__ import annotations

import pytest
import torch
from launches import launches

from agentctx.kernels.gpu import quant
from agentctx.kernels.records import KVPages


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 256)]
)
def test_quantising(within, dtype: torch.dtype, size: int, bits: int, arch: int) -> None:
    x = torch.zeros(2, 2, 64, size, dtype=dtype)
    (report,) = launches(lambda: quant.quantize_pages(x, x, bits), arch)
    within(f"quantise {bits} {dtype} {size}", report, at_least={"LDG.*128": 2})


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [128, 256])
def test_dequantising(within, bits: int, size: int, arch: int) -> None:
    kv = KVPages.empty(2, 2, size, format=f"int{bits}")
    ids = torch.zeros(2, dtype=torch.int32)
    (report,) = launches(lambda: quant.dequantize_pages(kv, ids, torch.bfloat16), arch)
    within(f"dequantise {bits} {size}", report, at_least={"STG.*128": 2})
