"""Adapts block scores to the C++ operators. The GPU's layout of minmax, head sizes that are no multiple of 16
(minmax takes any), capacities that are none and float16 are left to torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agentctx.kernels import threads
from agentctx.kernels.errors import Uncovered
from agentctx.kernels.records import BlockSummary

GROUPS = {"max": 0, "mean": 1, "sum": 2}
KINDS = {"minmax": 0, "mean": 1, "submeans": 2, "hadamard2": 3}
MANHATTAN = 4


def covered(q: Tensor, summary: BlockSummary) -> None:
    """Raise Uncovered for what the C++ scorer does not serve."""
    data, kind = summary.data, summary.kind
    if q.dtype == torch.float16 or data.dtype == torch.float16:
        raise Uncovered("float16")
    if data.stride(-1) != 1:
        raise Uncovered("a summary with a strided last dimension")
    if kind == "minmax":
        if data.dim() == 5:
            raise Uncovered("the layout of minmax for a GPU")
        if data.shape[3] % 16:
            raise Uncovered(f"a capacity of {data.shape[3]} blocks, no multiple of 16")
    elif q.shape[3] % 16:
        raise Uncovered(f"head size {q.shape[3]}, no multiple of 16")


def share(q: Tensor, summary: BlockSummary) -> int:
    """Threads that a pass over the summary is worth."""
    data = summary.data
    rows = q.shape[1] // data.shape[1] * q.shape[2]
    return threads.worth(data.numel() * data.element_size(), 2.0 * rows * data.numel())


def block_scores(
    lib: Any,
    q: Tensor,
    summary: BlockSummary,
    context_lens: Tensor,
    q_pos: Tensor | None,
    group: str,
    per_head: bool,
    estimate: str,
    scale: float,
) -> Tensor:
    covered(q, summary)
    kind = MANHATTAN if estimate == "manhattan" else KINDS[summary.kind]
    found: Tensor = lib.block_scores(
        q,
        summary.data,
        summary.scale,
        kind,
        summary.page_tokens,
        context_lens,
        q_pos,
        GROUPS[group],
        per_head,
        scale,
        share(q, summary),
    )
    return found


def pool_queries(lib: Any, q: Tensor, block_q: int) -> Tensor:
    if q.dtype == torch.float16:
        raise Uncovered("float16")
    if q.stride(3) != 1:
        raise Uncovered("a strided last dimension")
    pooled: Tensor = lib.pool_queries(q, block_q, threads.worth(q.numel() * q.element_size(), q.numel()))
    return pooled
