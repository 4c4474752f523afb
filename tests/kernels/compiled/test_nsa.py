"""Native sparse attention compiled: the compressed branch and the importance, for Ampere and Hopper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from launched import ints, launched, pool, values

from agentctx.kernels.gpu import nsa, tiles

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("size", "rows", "dtype"),
    [
        (64, 4096, BF16),
        (128, 4096, BF16),
        (128, 1, BF16),
        (256, 4096, BF16),
        (256, 1, BF16),
        (64, 4096, FP32),
        (128, 4096, FP32),
    ],
)
def test_compressed_keys(arch: int, size: int, rows: int, dtype: Any, within: Any) -> None:
    q, kv = values(1, 32, rows, size, dtype=dtype), pool("paged", size, dtype)
    cmp = (values(1, 8, 2047, size, dtype=dtype), values(1, 8, 2047, size, dtype=dtype))
    reports = launched(
        arch,
        lambda: nsa._compressed(q, cmp, kv, 32, 16, ints(1), 0.1),
        nsa.compressed_kernel,
        nsa.importance_kernel,
        users=(tiles,),
    )
    wanted = {} if dtype == FP32 else {"HGMMA" if arch >= 90 and rows > 16 else "HMMA": 1}
    for name, report in zip(("compressed", "importance"), reports, strict=True):
        kind = "fp32" if dtype == FP32 else "bf16"
        within(f"{name} {kind} D{size} T{rows}", report, at_least=wanted)
