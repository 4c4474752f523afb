"""Selection by sorting each list, as it is defined."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from agentctx.kernels.records import BlockSelection, BlockSummary
from agentctx.kernels.reference.scores import block_scores


def topk_blocks(
    scores: Tensor, n_blocks: int | Tensor, k: int, sink_blocks: int, local_blocks: int
) -> tuple[Tensor, Tensor]:
    return _lists(scores, n_blocks, k, sink_blocks, local_blocks, None, k)


def topp_blocks(
    scores: Tensor,
    n_blocks: int | Tensor,
    p: float,
    k_min: int,
    k_max: int,
    sink_blocks: int,
    local_blocks: int,
) -> tuple[Tensor, Tensor]:
    return _lists(scores, n_blocks, k_max, sink_blocks, local_blocks, p, k_min)


def _lists(
    scores: Tensor, n_blocks: int | Tensor, slots: int, sink: int, local: int, p: float | None, least: int
) -> tuple[Tensor, Tensor]:
    lead = scores.shape[:-1]
    blocks = torch.zeros((*lead, slots), dtype=torch.int32)
    counts = torch.zeros(lead, dtype=torch.int32)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in lead)).reshape(-1, len(lead)).tolist():
        if isinstance(n_blocks, int):
            n = n_blocks
        else:
            n = int(n_blocks[at[0]] if n_blocks.dim() == 1 else n_blocks[at[0], at[2]])
        if not 0 <= n <= scores.shape[-1]:
            raise IndexError(f"n_blocks has {n}: there are scores for {scores.shape[-1]}")
        row = [-math.inf if math.isnan(x) else x for x in scores[tuple(at)].tolist()]
        forced = [i < sink or i >= n - local for i in range(n)]
        order = sorted(
            range(n), key=lambda i: (math.inf, 1, i) if forced[i] else (row[i], 0, i), reverse=True
        )
        count = slots if p is None else max(_prefix([row[i] for i in order], p), sum(forced), least)
        chosen = sorted(order[: min(count, slots)])
        blocks[tuple(at)][: len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
        counts[tuple(at)] = len(chosen)
    return blocks, counts


def _prefix(row: list[float], p: float) -> int:
    """Length of the shortest prefix of `row` that holds the share p of its softmax."""
    best = max(row, default=-math.inf)
    if p == 1 or best == -math.inf:
        return len(row)
    weights = [1.0 if x == best else math.exp(x - best) for x in row]
    total, held = sum(weights), 0.0
    for i, weight in enumerate(weights):
        held += weight
        if held >= p * total:
            return i + 1
    return len(row)


def resolve_pages(blocks: Tensor, counts: Tensor, block_table: Tensor) -> BlockSelection:
    pages = torch.zeros_like(blocks)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
        count = int(counts[tuple(at)])
        if not 0 <= count <= blocks.shape[-1]:
            raise IndexError(f"counts{at} is {count}: 0 to {blocks.shape[-1]} is needed")
        for slot in range(count):
            block = int(blocks[tuple(at)][slot])
            if not 0 <= block < block_table.shape[1]:
                raise IndexError(f"blocks{[*at, slot]} is {block}: the table has {block_table.shape[1]}")
            pages[tuple(at)][slot] = block_table[at[0], block]
    return BlockSelection(pages, blocks, counts)


def select_blocks(
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
    scores = block_scores(q, summary, context_lens, None, group, False, "dot", scale).amax(2)
    n_blocks = ((context_lens + summary.page_tokens - 1) // summary.page_tokens).int()
    return resolve_pages(*topk_blocks(scores, n_blocks, k, sink_blocks, local_blocks), block_table)
