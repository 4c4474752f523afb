"""Copies in the interpreter, and a page that does not exist; writes are in `test_summary.py`."""

from __future__ import annotations

import drawn
import pytest
import torch
from triton_cases import both_orders, fault

from agentctx.kernels.gpu.store import COPY, _copy
from agentctx.kernels.records import KVPages
from agentctx.kernels.store import copy_pages, write_kv


@pytest.mark.parametrize("format", ["paged", "int8", "int4"])
def test_copies_are_exact(format: str) -> None:
    case = drawn.make(kv_heads=2, size=50, lens=[200], dtype=torch.bfloat16, format=format)
    ids = torch.tensor([[3, 0], [1, 4]], dtype=torch.int32)

    def copied() -> KVPages:
        to = KVPages.empty(5, 2, 50, format=format)
        copy_pages(case.kv, to, ids, impl="triton")
        return to

    for got in both_orders(copied):
        assert torch.equal(got.k[0], case.kv.k[3]) and torch.equal(got.v[4], case.kv.v[1])
        assert not bool(got.k[1].any())


def test_a_page_beyond_the_pool_is_caught() -> None:
    kv, rows = KVPages.empty(2, 1, 32), torch.ones(1, 1, 4, 32, dtype=torch.bfloat16)
    table, at = torch.tensor([[9]], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with fault("out-of-bounds store"):
        write_kv(kv, rows, rows, table, at, impl="triton")


def test_positions_may_be_one_number_for_all() -> None:
    rows = torch.randn(2, 1, 4, 32, generator=torch.Generator().manual_seed(0))
    table, at = torch.tensor([[1], [0]], dtype=torch.int32), torch.tensor([7], dtype=torch.int32).expand(2)

    def written() -> KVPages:
        kv = KVPages.empty(2, 1, 32, dtype=torch.float32)
        write_kv(kv, rows, rows, table, at, impl="triton")
        return kv

    for got in both_orders(written):
        assert torch.equal(got.k[1, 0, 7:11], rows[0, 0]) and torch.equal(got.v[0, 0, 7:11], rows[1, 0])


def test_a_grid_that_no_gpu_takes_is_caught() -> None:
    x, ids = torch.zeros(2, 1, 8), torch.zeros(1, 2, dtype=torch.int32)
    with fault("65535 programs"):
        _copy[(1, 65536)](x, x, ids, 8, 1, 8, 8, 8, 8, 2, 1, **COPY.launch)
