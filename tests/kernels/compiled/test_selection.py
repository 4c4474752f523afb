"""Selection, compiled: every configuration row, top-k with pages resolved and top-p."""

from __future__ import annotations

import pytest
import torch
from launches import launches

from agentctx.kernels.gpu import selection

SPILL = 4  # some compilers put one register aside around the search among equals, which few lists take


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("blocks", [1024, 4096, 8192, 16384])
def test_top_k(within, blocks: int, arch: int) -> None:
    scores, table = torch.zeros(1, 2, 1, 1, blocks), torch.zeros(1, blocks, dtype=torch.int32)
    lens = torch.zeros(1, dtype=torch.int32)
    (report,) = launches(lambda: selection._launch(scores, lens, 64, 1, 2, table=table, tokens=64), arch)
    within(f"top-k of {blocks}", report, max_spill=SPILL, at_least={"LDG.*128": 1})


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("blocks", [1024, 8192])
def test_top_p(within, blocks: int, arch: int) -> None:
    scores = torch.zeros(1, 2, blocks)
    (report,) = launches(lambda: selection.topp_blocks(scores, blocks, 0.9, 1, 256, 1, 2), arch)
    within(f"top-p of {blocks}", report, at_least={"LDG.*128": 1})


@pytest.mark.parametrize("arch", [80, 90])
def test_resolve(within, arch: int) -> None:
    blocks, counts = torch.zeros(1, 2, 64, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)
    table = torch.zeros(1, 64, dtype=torch.int32)
    (report,) = launches(lambda: selection.resolve_pages(blocks, counts, table), arch)
    within("resolve", report)
