"""Every configuration of the union of attentions, compiled within its budget."""

from __future__ import annotations

from collections.abc import Callable

import aot
import pytest

from agentctx.kernels.gpu.configs import pick
from agentctx.kernels.gpu.merge import CONFIGS, merge_two

STRIDES = ["ab", "ah", "at", "ad", "bb", "bh", "bt", "bd", "lab", "lah", "lat", "lbb", "lbh", "lbt"]


@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize("dim", (64, 256))
def test_every_row(dim: int, arch: int, within: Callable[..., None]) -> None:
    config = pick(CONFIGS, arch, dim=dim)
    signature = {"A": "*fp32", "B": "*fp32", "Out": "*bf16"} | dict.fromkeys(("LseA", "LseB", "Lse"), "*fp32")
    aligned = [*signature, "ab", "ah", "at", "bb", "bh", "bt"]
    signature |= dict.fromkeys(("rows", "heads", "tokens", *STRIDES), "i32")
    sizes = {"ad": 1, "bd": 1, "D": dim, "ROWS": config.blocks["ROWS"], "DP": dim, "ALONE": False}
    report = aot.compile_kernel(merge_two, signature, sizes, arch, config.warps, config.stages, aligned)
    within(f"D{dim}", report, at_least={"LDG.*128": 2})
