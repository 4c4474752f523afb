"""Selection by torch's top-k over whole numbers, which leave it no tie to break."""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels.fallback.scores import block_scores, outside
from agentctx.kernels.records import BlockSelection, BlockSummary

UNUSED = torch.iinfo(torch.int64).min
FORCED = torch.iinfo(torch.int32).max  # above the key of +inf


def _keys(scores: Tensor, n_blocks: int | Tensor, sink: int, local: int) -> tuple[Tensor, Tensor]:
    """int64 keys in the order of selection, the block in the low half, `UNUSED` past n; and n itself."""
    n = torch.as_tensor(n_blocks, dtype=torch.int64, device=scores.device)  # as wide as `block`: no casts
    if n.dim():
        lead = (n.shape[0], 1, n.shape[1]) if n.dim() == 2 else (n.shape[0],) + (1,) * (scores.dim() - 2)
        n = n.view(lead)
    if outside(n, 0, scores.shape[-1]):
        raise IndexError(f"n_blocks is {n.flatten().tolist()}: there are scores for {scores.shape[-1]}")
    n = n.expand(scores.shape[:-1]).unsqueeze(-1)
    block = torch.arange(scores.shape[-1], device=scores.device)
    bits = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf).add_(0.0).view(torch.int32)
    key = (bits >> 31).bitwise_and_(FORCED).bitwise_xor_(bits).masked_fill_(block >= n - local, FORCED)
    key[..., :sink] = FORCED
    return key.long().bitwise_left_shift_(32).bitwise_or_(block).masked_fill_(block >= n, UNUSED), n


def _lists(best: Tensor, counts: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Ascending lists of `slots` from falling keys, of which the first `counts` are taken."""
    width = best.shape[-1]
    unused = torch.arange(width, device=best.device) >= counts.unsqueeze(-1)
    last = torch.iinfo(torch.int32).max
    blocks = best.to(torch.int32).masked_fill_(unused, last).sort(-1).values.masked_fill_(unused, 0)
    if width < slots:
        blocks = torch.nn.functional.pad(blocks, (0, slots - width))
    return blocks, counts.to(torch.int32)


def topk_blocks(
    scores: Tensor, n_blocks: int | Tensor, k: int, sink_blocks: int, local_blocks: int
) -> tuple[Tensor, Tensor]:
    keys, n = _keys(scores, n_blocks, sink_blocks, local_blocks)
    return _lists(keys.topk(min(k, keys.shape[-1])).values, n[..., 0].clamp_max(k), k)


def topp_blocks(
    scores: Tensor,
    n_blocks: int | Tensor,
    p: float,
    k_min: int,
    k_max: int,
    sink_blocks: int,
    local_blocks: int,
) -> tuple[Tensor, Tensor]:
    keys, n = _keys(scores, n_blocks, sink_blocks, local_blocks)
    keys = keys.sort(-1, descending=True).values
    n = n[..., 0]
    row = scores.masked_fill(scores.isnan(), float("-inf")).double()
    row = row.gather(-1, (keys & 0xFFFFFFFF).masked_fill(keys == UNUSED, 0))
    row = row.masked_fill(keys == UNUSED, float("-inf"))
    best = row.amax(-1, keepdim=True) if row.shape[-1] else row
    held = torch.where(row == best, 1.0, (row - best).exp()).masked_fill(keys == UNUSED, 0).cumsum(-1)
    short = held < p * held[..., -1:]
    every = n if p == 1 else torch.where((best == float("-inf")).any(-1), n, short.sum(-1) + 1)
    forced = (keys >> 32 == FORCED).sum(-1)
    counts = every.maximum(forced).clamp(k_min, k_max).minimum(n)
    return _lists(keys[..., :k_max], counts, k_max)


def resolve_pages(blocks: Tensor, counts: Tensor, block_table: Tensor) -> BlockSelection:
    slots, table = blocks.shape[-1], block_table.shape[1]
    if outside(counts, 0, slots):
        raise IndexError(f"counts: 0 to {slots} is needed")
    unused = torch.arange(slots, dtype=torch.int32, device=blocks.device) >= counts.unsqueeze(-1)
    at = blocks.masked_fill(unused, 0).long()
    if table == 0 and unused.all():
        return BlockSelection(torch.zeros_like(blocks), blocks, counts)
    if outside(at, 0, table - 1):
        raise IndexError(f"blocks: the table has {table}")
    pages = block_table.gather(1, at.flatten(1)).view(blocks.shape)
    return BlockSelection(pages.masked_fill(unused, 0), blocks, counts)


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
    scores = block_scores(q, summary, context_lens, None, group, False, "dot", scale)
    scores = scores[:, :, 0] if q.shape[2] == 1 else scores.amax(2)
    n_blocks = (context_lens + summary.page_tokens - 1) // summary.page_tokens
    return resolve_pages(*topk_blocks(scores, n_blocks, k, sink_blocks, local_blocks), block_table)
