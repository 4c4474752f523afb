"""Split-K on the host: how many parts a list is cut into, and where they are kept until they are united.

Nothing here looks at the contents of a tensor, so a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from agentctx.kernels.errors import Uncovered
from agentctx.kernels.gpu.configs import processors

LOG2E = 1.4426950408889634
MAX_ROWS = 64
MAX_SIZE = 256
LEAST_TILES = 4  # of a split


class Parts(NamedTuple):
    """The work of each list in `splits` parts: float32 `[B, L, splits, rows, D]`, their lse, and tickets."""

    splits: int
    out: Tensor
    lse: Tensor
    tickets: Tensor  # int32 [B, L], 0: a memset, one more node of a graph, which may not share them


def covered_rows(q: Tensor, lists: int) -> int:
    """Rows that share a list. Raises Uncovered for more rows, or a head size, than the kernels serve."""
    _, heads, tokens, size = q.shape
    rows = heads // lists * tokens
    if rows > MAX_ROWS:
        raise Uncovered(f"{rows} rows of a list: at most {MAX_ROWS}")
    if size % 16 or size > MAX_SIZE or not size:
        raise Uncovered(f"head size {size}: a multiple of 16 up to {MAX_SIZE} is served")
    return rows


def outputs(q: Tensor, slots: int, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for out and lse; without slots nobody sees anything, and they are filled."""
    out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return (out, lse) if slots else (out.zero_(), lse.fill_(-torch.inf))


def workspace(q: Tensor, lists: int, tiles: int, splits: int | None) -> Parts:
    """`splits` parts, or as many as fill the GPU twice with no part under LEAST_TILES tiles."""
    batch, heads, tokens, size = q.shape
    if splits is None:
        splits = min(-(-2 * processors(q.get_device()) // (batch * lists)), tiles // LEAST_TILES)
    splits = max(1, min(splits, tiles))
    rows = (batch, heads * tokens * splits if splits > 1 else 1)
    out = torch.empty(*rows, size, dtype=torch.float32, device=q.device)
    lse = torch.empty(rows, dtype=torch.float32, device=q.device)
    count = batch * lists if splits > 1 else 1
    return Parts(splits, out, lse, torch.zeros(count, dtype=torch.int32, device=q.device))


def folded(scale: float, softcap: float) -> tuple[float, float]:
    """What `combine.capped` multiplies with, log2(e) in it."""
    if softcap > 0:
        return 2 * LOG2E * scale / softcap, softcap * LOG2E
    return scale * LOG2E, 0.0
