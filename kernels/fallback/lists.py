"""Complete lists by one sort: what is not wanted becomes a large number and ends behind the count."""

from __future__ import annotations

import torch
from torch import Tensor

NONE = 2**31 - 1


def complete_lists(
    blocks: Tensor,
    counts: Tensor,
    q_offset: Tensor,
    block_q: int,
    page_tokens: int,
    sink_blocks: int,
    local_blocks: int,
) -> tuple[Tensor, Tensor]:
    query_blocks, slots = blocks.shape[2:]

    def steps(n: int) -> Tensor:
        return torch.arange(n, dtype=torch.int32, device=blocks.device)

    starts = q_offset[:, None] + block_q * steps(query_blocks)
    d = (starts // page_tokens)[:, None, :, None]  # [B, 1, M, 1]
    lead = blocks.shape[:3]
    given = torch.where(steps(slots) < counts[..., None], blocks, NONE)
    sinks = steps(sink_blocks).expand(*lead, sink_blocks)
    local = (d - 1 - steps(local_blocks)).expand(*lead, local_blocks)
    entries = torch.cat([given, sinks, local], -1)
    entries = torch.where((entries >= 0) & (entries < d), entries, NONE).sort(-1).values
    entries[..., 1:].masked_fill_(entries[..., 1:] == entries[..., :-1], NONE)
    entries = entries.sort(-1).values
    kept = entries < NONE
    return torch.where(kept, entries, 0), kept.sum(-1, dtype=torch.int32)
