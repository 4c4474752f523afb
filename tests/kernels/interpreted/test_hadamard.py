"""The rotation in the interpreter."""

from __future__ import annotations

import drawn
import pytest
import torch
from triton_cases import both_orders

from agentctx.kernels.hadamard import hadamard


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 16), (70, 64), (3, 256)])
def test_agrees_with_the_matrix(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    want = hadamard(x.float(), impl="reference")
    for got in both_orders(lambda: hadamard(x, impl="triton")):
        assert got.dtype == dtype and drawn.relative(got, want) <= drawn.RELATIVE[dtype]
