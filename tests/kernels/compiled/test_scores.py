"""Block scores, compiled: every configuration row, decode and prefill tiles."""

from __future__ import annotations

import pytest
import torch
from launches import launches

from agentctx.kernels.gpu import scores
from agentctx.kernels.records import BlockSummary

BF16, F32 = torch.bfloat16, torch.float32
DENSE = [
    ("minmax", BF16, 128, 1),
    ("minmax", BF16, 128, 8),
    ("minmax", BF16, 256, 1),
    ("minmax", F32, 64, 1),
    ("minmax", F32, 128, 1),
    ("minmax", F32, 256, 8),
    ("mean", BF16, 128, 1),
    ("submeans", BF16, 128, 8),
    ("submeans", BF16, 256, 8),
    ("submeans", F32, 64, 8),
    ("submeans", F32, 128, 8),
]


def summary(kind: str, dtype: torch.dtype, size: int, blocks: int = 128) -> BlockSummary:
    shape = {
        "minmax": (1, 2, blocks, 2, size),
        "mean": (1, 2, blocks, size),
        "submeans": (1, 2, 4 * blocks, size),
        "hadamard2": (1, 2, 64 * blocks, size // 4),
    }[kind]
    if kind == "hadamard2":
        return BlockSummary(kind, torch.zeros(shape, dtype=torch.uint8), 64, torch.ones(2))
    return BlockSummary(kind, torch.zeros(shape, dtype=dtype), 64)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("kind", "dtype", "size", "rows"), DENSE)
def test_dense_scores(within, kind: str, dtype: torch.dtype, size: int, rows: int, arch: int) -> None:
    q, lens = torch.zeros(1, 8, rows, size, dtype=dtype), torch.zeros(1, dtype=torch.int32)
    of = summary(kind, dtype, size)
    (report,) = launches(lambda: scores.block_scores(q, of, lens, None, "max", False, "dot", 0.1), arch)
    wanted = {"LDG.*128": 7 if dtype == BF16 else 3} | ({"HMMA": 1} if dtype == BF16 else {"FFMA": 1})
    within(f"{kind} {dtype} {size} rows {rows}", report, at_least=wanted)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("estimate", ["dot", "manhattan"])
@pytest.mark.parametrize("size", [128, 256])
def test_scores_of_codes(within, estimate: str, size: int, arch: int) -> None:
    q, lens = torch.zeros(1, 8, 1, size, dtype=BF16), torch.zeros(1, dtype=torch.int32)
    of = summary("hadamard2", BF16, size)
    rotation, report = launches(
        lambda: scores.block_scores(q, of, lens, None, "max", False, estimate, 0.1), arch
    )
    within(f"{estimate} {size}", report, at_least={"HMMA": 8, "LDG.*128": 1}, at_most={"POPC": 0})
    within(f"rotation of queries {size}", rotation, at_least={"H.*MMA": 1})


@pytest.mark.parametrize("arch", [80, 90])
def test_pooling(within, arch: int) -> None:
    q = torch.zeros(1, 8, 256, 128, dtype=BF16)
    (report,) = launches(lambda: scores.pool_queries(q, 128), arch)
    within("pool 128", report, at_least={"LDG.*128": 1})
