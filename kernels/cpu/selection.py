"""Adapts selection to the C++ operators."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from agentctx.kernels import threads
from agentctx.kernels.cpu.scores import GROUPS, KINDS, covered, share
from agentctx.kernels.records import BlockSelection, BlockSummary

RANKING_FLOP = 20.0  # a ranked score costs about as much as so many FLOP
SORTING_FLOP = 500.0


def topk_blocks(
    lib: Any, scores: Tensor, n_blocks: int | Tensor, k: int, sink_blocks: int, local_blocks: int
) -> tuple[Tensor, Tensor]:
    n, every = (n_blocks, 0) if isinstance(n_blocks, Tensor) else (None, n_blocks)
    use = threads.worth(scores.numel() * 4, scores.numel() * RANKING_FLOP)
    found: tuple[Tensor, Tensor] = lib.topk_blocks(scores, n, every, k, sink_blocks, local_blocks, use)
    return found


def topp_blocks(
    lib: Any,
    scores: Tensor,
    n_blocks: int | Tensor,
    p: float,
    k_min: int,
    k_max: int,
    sink_blocks: int,
    local_blocks: int,
) -> tuple[Tensor, Tensor]:
    n, every = (n_blocks, 0) if isinstance(n_blocks, Tensor) else (None, n_blocks)
    use = threads.worth(scores.numel() * 4, scores.numel() * SORTING_FLOP)
    found: tuple[Tensor, Tensor] = lib.topp_blocks(
        scores, n, every, p, k_min, k_max, sink_blocks, local_blocks, use
    )
    return found


def resolve_pages(lib: Any, blocks: Tensor, counts: Tensor, block_table: Tensor) -> BlockSelection:
    return BlockSelection(lib.resolve_pages(blocks, counts, block_table), blocks, counts)


def select_blocks(
    lib: Any,
    q: Tensor,
    summary: BlockSummary,
    block_table: Tensor,
    context_lens: Tensor,
    k: int,
    group: str,
    sink_blocks: int,
    local_blocks: int,
    scale: float,
) -> BlockSelection:
    covered(q, summary)
    return BlockSelection(
        *lib.select_blocks(
            q,
            summary.data,
            summary.scale,
            KINDS[summary.kind],
            summary.page_tokens,
            block_table,
            context_lens,
            k,
            GROUPS[group],
            sink_blocks,
            local_blocks,
            scale,
            share(q, summary),
        )
    )
