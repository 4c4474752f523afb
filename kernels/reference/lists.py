"""The definition of complete lists: a set for each query block."""

from __future__ import annotations

import torch
from torch import Tensor


def complete_lists(
    blocks: Tensor,
    counts: Tensor,
    q_offset: Tensor,
    block_q: int,
    page_tokens: int,
    sink_blocks: int,
    local_blocks: int,
) -> tuple[Tensor, Tensor]:
    batch, heads, query_blocks, slots = blocks.shape
    full = torch.zeros(batch, heads, query_blocks, slots + sink_blocks + local_blocks, dtype=torch.int32)
    n = torch.zeros_like(counts)
    for b in range(batch):
        for h in range(heads):
            for i in range(query_blocks):
                d = (int(q_offset[b]) + i * block_q) // page_tokens
                wanted = set(blocks[b, h, i, : int(counts[b, h, i])].tolist())
                wanted |= {*range(sink_blocks), *range(d - local_blocks, d)}
                held = sorted(block for block in wanted if 0 <= block < d)
                full[b, h, i, : len(held)] = torch.tensor(held, dtype=torch.int32)
                n[b, h, i] = len(held)
    return full, n
