"""Rotary positions, compiled."""

from __future__ import annotations

import pytest
import torch
from launches import launches

from agentctx.kernels.gpu import rope


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 256)]
)
def test_turning(within, dtype: torch.dtype, size: int, style: str, arch: int) -> None:
    x, at = torch.zeros(1, 8, 64, size, dtype=dtype), torch.zeros(64, dtype=torch.int32)
    (report,) = launches(lambda: rope.rope(x, at, torch.ones(size // 2), False, style, 1.0, None), arch)
    within(f"{style} {dtype} {size}", report, at_least={"LDG.*(64|128)": 1, "STG.*(64|128)": 1})
    assert report.local == 0  # no slow path of a cosine


@pytest.mark.parametrize("arch", [80, 90])
def test_moving(within, arch: int) -> None:
    x, at = torch.zeros(1, 8, 64, 128, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.int32)
    frequency = torch.ones(64)
    (report,) = launches(lambda: rope.rope_move(x, at, at, frequency, frequency, "half"), arch)
    within("move 128", report, at_least={"LDG.*64": 1, "STG.*64": 1})
