"""Summaries in the interpreter: built, and updated by a write, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import drawn
import pytest
import test_store
import torch
from triton_cases import both_orders

from agentctx.kernels.records import BlockSummary
from agentctx.kernels.store import write_kv
from agentctx.kernels.summary import KINDS, build_summary


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("format", "page"), [("paged", 64), ("int8", 16), ("int4", 64)])
def test_building(kind: str, format: str, page: int) -> None:
    case = drawn.make(
        batch=2, size=32, page=page, lens=[2 * page + 1, 7], dtype=torch.bfloat16, format=format
    )
    cut = torch.full((1,), 0.9) if kind == "hadamard2" else None
    ask = (case.kv, case.table, case.lens, kind)
    for got in both_orders(lambda: build_summary(*ask, thresholds=cut, impl="triton")):
        empty = replace(got, data=torch.zeros_like(got.data))
        want = build_summary(*ask, out=empty, thresholds=cut, impl="reference").data
        if kind in ("minmax", "hadamard2"):
            assert torch.equal(got.data, want)
        else:
            assert drawn.relative(got.data, want) <= drawn.RELATIVE[want.dtype]


@pytest.mark.parametrize("start", [[47, 12], [0, 64]])
def test_a_write_updates_the_blocks_it_touches(start: list[int]) -> None:
    case = drawn.make(batch=2, size=32, page=64, lens=[70, 70], dtype=torch.bfloat16)
    blocks, size = case.table.shape[1], 32
    rows = torch.randn(2, 20, 1, size, generator=case.generator).bfloat16().transpose(1, 2)
    at = torch.tensor(start, dtype=torch.int32)

    def written(impl: str) -> tuple[torch.Tensor, ...]:
        kv = test_store.copied(case.kv)
        of = test_store.summaries(kv, 2, blocks)
        data = torch.full((2, 1, blocks, 2, size), float("nan"), dtype=torch.bfloat16)
        of[0] = BlockSummary("minmax", data, 64)
        write_kv(kv, rows, rows, case.table, at, summary=of, impl=impl)
        return (kv.k, kv.v, *(one.data for one in of))

    want = written("reference")
    for got in both_orders(lambda: written("triton")):
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one.isnan(), other.isnan()), "other entries were written"
            assert drawn.relative(one.nan_to_num(), other.nan_to_num()) <= 1e-6
