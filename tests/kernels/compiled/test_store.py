"""Writes and copies, compiled."""

from __future__ import annotations

import pytest
import torch
from launches import launches

from agentctx.kernels.gpu import store
from agentctx.kernels.records import BlockSummary, KVPages


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 256)]
)
def test_writing(within, dtype: torch.dtype, size: int, arch: int) -> None:
    kv, x = KVPages.empty(4, 2, size, dtype=dtype), torch.zeros(1, 2, 64, size, dtype=dtype)
    table, at = torch.zeros(1, 4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    of = (BlockSummary("submeans", torch.zeros(1, 2, 16, size, dtype=dtype), 64),)
    report, update = launches(lambda: store.write_kv(kv, x, x, table, at, of), arch)
    within(f"write {dtype} {size}", report, at_least={"LDG.*128": 2, "STG.*128": 2})
    within(f"update {dtype} {size}", update, at_least={"LDG.*128": 2})


@pytest.mark.parametrize("arch", [80, 90])
def test_copying(within, arch: int) -> None:
    pool, ids = torch.zeros(4, 2, 64, 128, dtype=torch.bfloat16), torch.zeros(2, 2, dtype=torch.int32)
    (report,) = launches(lambda: store.copy_pages(((pool, pool),), ids), arch)
    within("copy", report, at_least={"LDG.*128": 2, "STG.*128": 2})
