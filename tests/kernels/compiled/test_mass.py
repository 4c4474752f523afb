"""Attention mass compiled: both passes, every row of the table, for Ampere and Hopper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from launched import ints, launched, pool, values

from agentctx.kernels.gpu import mass, tiles

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("format", "size", "rows", "dtype", "per"),
    [
        ("paged", 64, 32, BF16, "token"),
        ("paged", 128, 32, BF16, "token"),
        ("paged", 128, 32, BF16, "block"),
        ("paged", 128, 2, BF16, "token"),
        ("paged", 256, 32, BF16, "token"),
        ("paged", 256, 2, BF16, "token"),
        ("int8", 128, 32, BF16, "token"),
        ("int4", 128, 32, BF16, "token"),
        ("paged", 64, 32, FP32, "token"),
        ("paged", 128, 32, FP32, "token"),
    ],
)
def test_both_passes(arch: int, format: str, size: int, rows: int, dtype: Any, per: str, within: Any) -> None:
    q, kv = values(1, 32, rows, size, dtype=dtype), pool(format, size, dtype)
    reports = launched(
        arch,
        lambda: mass.attention_mass(q, kv, ints(1, 2048), ints(1), None, None, None, per, False, 0.1, 0.0),
        mass.lse_kernel,
        mass.mass_kernel,
        users=(tiles,),
    )
    product = "HGMMA" if arch >= 90 and rows > 4 else "HMMA"
    for name, report in zip(("lse", "mass"), reports, strict=True):
        kind = "fp32" if dtype == FP32 else "bf16"
        wanted = {} if dtype == FP32 else {product: 1}
        within(f"{name} {format} {kind} D{size} T{rows} {per}", report, at_least=wanted)
