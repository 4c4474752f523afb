"""The prefill kernels compiled: every row of both tables, for Ampere and Hopper."""

from __future__ import annotations

from typing import Any

import aot
import pytest
import torch
from launched import ints, launched, lists, pool, values

from agentctx.kernels.errors import Uncovered
from agentctx.kernels.gpu import prefill, tiles, token_prefill

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# format, head size, rows of a query block, dtype, page
SHAPES = [
    ("paged", 64, 128, BF16, 64),
    ("paged", 128, 16, BF16, 64),
    ("paged", 128, 64, BF16, 64),
    ("paged", 128, 128, BF16, 64),
    ("paged", 128, 128, FP16, 16),
    ("paged", 256, 16, BF16, 64),
    ("paged", 256, 128, BF16, 64),
    ("int8", 128, 16, BF16, 64),
    ("int8", 128, 128, BF16, 128),
    ("int8", 256, 128, BF16, 64),
    ("int4", 128, 64, BF16, 64),
    ("int4", 128, 128, BF16, 64),
    ("paged", 64, 128, FP32, 64),
    ("paged", 128, 128, FP32, 64),
    ("paged", 256, 128, FP32, 64),
]
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}


def expected(report: aot.Report, dtype: torch.dtype, rows: int) -> dict[str, int]:
    """128-bit asynchronous copies, and tensor cores: warp groups' on Hopper from 64 rows."""
    if dtype == FP32:
        return {"LDGSTS.*128": 1}
    return {"HGMMA" if report.arch >= 90 and rows >= 64 else "HMMA": 1, "LDGSTS.*128": 8}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("format", "size", "rows", "dtype", "page"), SHAPES)
def test_lists(arch: int, format: str, size: int, rows: int, dtype: Any, page: int, within: Any) -> None:
    if arch == 80 and format != "paged" and size == 256:
        pytest.skip("left to torch: test_what_spills_is_left_to_torch")
    q, kv = values(1, 32, 4096, size, dtype=dtype), pool(format, size, dtype, page=page)
    chosen = lists(1, 8, 4096 // rows, 256)
    (report,) = launched(
        arch,
        lambda: prefill.block_sparse_prefill(
            q, kv, chosen, ints(1, 2048), ints(1), ints(1), rows, 0.1, 0.0, dtype
        ),
        prefill.prefill_kernel,
        users=(tiles,),
    )
    variant = f"lists {format} {NAMES[dtype]} D{size} rows {rows} page {page}"
    within(variant, report, at_least=expected(report, dtype, rows))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("mode", "valid", "softcap"), [("dense", False, 0.0), ("window", False, 0.0), ("window", True, 20.0)]
)
def test_dense_and_window(arch: int, mode: str, valid: bool, softcap: float, within: Any) -> None:
    q, kv = values(1, 32, 4096, 128), pool("paged", 128, valid=valid)
    tables, options = (ints(1, 2048), ints(1)), (ints(1), 0.1, softcap, BF16)

    def call() -> None:
        if mode == "dense":
            prefill.dense_prefill(q, kv, *tables, *options)
        else:
            prefill.window_prefill(q, kv, *tables, 4096, 4, *options)

    (report,) = launched(arch, call, prefill.prefill_kernel, users=(tiles,))
    variant = f"{mode}{' valid' if valid else ''}{' softcap' if softcap else ''}"
    within(variant, report, at_least=expected(report, BF16, 128))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("format", "size", "group", "dtype"),
    [
        ("paged", 64, 4, BF16),
        ("paged", 128, 1, BF16),
        ("paged", 128, 4, BF16),
        ("paged", 128, 16, BF16),
        ("paged", 256, 4, BF16),
        ("int8", 128, 4, BF16),
        ("int4", 128, 4, BF16),
        ("int8", 256, 4, BF16),
        ("paged", 64, 4, FP32),
        ("paged", 128, 4, FP32),
    ],
)
def test_token_lists(arch: int, format: str, size: int, group: int, dtype: Any, within: Any) -> None:
    q, kv = values(1, 8 * group, 4096, size, dtype=dtype), pool(format, size, dtype)
    chosen = lists(1, 8, 4096, 16)
    (report,) = launched(
        arch,
        lambda: token_prefill.token_sparse_prefill(q, kv, chosen, ints(1), ints(1), 0.1, 0.0, dtype),
        token_prefill.token_prefill_kernel,
        users=(tiles,),
    )
    within(f"tokens {format} {NAMES[dtype]} D{size} G{group}", report, at_least={"LDGSTS.*128": 8})


def test_what_spills_is_left_to_torch() -> None:
    with pytest.raises(Uncovered, match="sm_80, head size 256"):
        launched(
            80,
            lambda: prefill.dense_prefill(
                values(1, 32, 4096, 256), pool("int8", 256), ints(1, 2048), ints(1), ints(1), 0.1, 0.0, BF16
            ),
            prefill.prefill_kernel,
            users=(tiles,),
        )


def test_lost_alignment_is_noticed() -> None:
    """Rows of 136 bytes cannot be copied by 16: no 128-bit copies are left, and the report says so."""
    (report,) = launched(
        90,
        lambda: prefill.dense_prefill(
            values(1, 32, 4096, 68), pool("paged", 68), ints(1, 2048), ints(1), ints(1), 0.1, 0.0, BF16
        ),
        prefill.prefill_kernel,
        users=(tiles,),
    )
    with pytest.raises(aot.OverBudget, match="LDGSTS"):
        report.require(at_least={"LDGSTS.*128": 8})
