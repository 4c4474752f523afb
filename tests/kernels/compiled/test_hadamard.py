"""The rotation, compiled."""

from __future__ import annotations

import pytest
import torch
from launches import launches

from agentctx.kernels.gpu.hadamard import hadamard


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_rotation(within, size: int, dtype: torch.dtype, arch: int) -> None:
    (report,) = launches(lambda: hadamard(torch.zeros(64, size, dtype=dtype)), arch)
    within(f"{dtype} {size}", report, at_least={"H.*MMA": 1, "LDG.*128": 1})
