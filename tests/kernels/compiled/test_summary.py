"""Summaries, compiled: every kind, and every format and configuration row."""

from __future__ import annotations

import pytest
import torch
from launches import launches

from agentctx.kernels.gpu import summary
from agentctx.kernels.records import KVPages

VARIANTS = [
    ("minmax", "paged", torch.bfloat16, 128),
    ("minmax", "paged", torch.bfloat16, 256),
    ("minmax", "paged", torch.float32, 128),
    ("minmax", "int8", torch.bfloat16, 128),
    ("minmax", "int4", torch.bfloat16, 128),
    ("mean", "paged", torch.bfloat16, 128),
    ("submeans", "paged", torch.bfloat16, 128),
    ("submeans", "paged", torch.float32, 256),
    ("vmax", "paged", torch.bfloat16, 128),
    ("vmax", "int8", torch.bfloat16, 128),
    ("hadamard2", "paged", torch.bfloat16, 128),
    ("hadamard2", "paged", torch.bfloat16, 256),
    ("hadamard2", "paged", torch.float32, 128),
    ("hadamard2", "int8", torch.bfloat16, 128),
]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("kind", "format", "dtype", "size"), VARIANTS)
def test_summary(within, kind: str, format: str, dtype: torch.dtype, size: int, arch: int) -> None:
    kv = KVPages.empty(4, 2, size, dtype=dtype, format=format)
    table, lens = torch.zeros(1, 64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    shape, of = {
        "minmax": ((1, 2, 64, 2, size), torch.float32 if kv.quantised else dtype),
        "mean": ((1, 2, 64, size), dtype),
        "submeans": ((1, 2, 256, size), dtype),
        "vmax": ((1, 2, 64), torch.float32),
        "hadamard2": ((1, 2, 4096, size // 4), torch.uint8),
    }[kind]
    data, cut = torch.zeros(shape, dtype=of), torch.ones(2) if kind == "hadamard2" else None
    (report,) = launches(lambda: summary.build_summary(kv, table, lens, kind, 0, data, cut), arch)
    wide = {"LDG.*128": 2} if format == "paged" else {"LDG.*": 1}
    within(f"{kind} {format} {dtype} {size}", report, at_least=wide)
