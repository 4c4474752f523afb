"""What every method that reads a part of the blocks has in common: when it is not worth it, and how a list of
blocks becomes attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agentctx.kernels.decode import sparse_decode
from agentctx.kernels.prefill import block_sparse_prefill
from agentctx.kernels.records import Attention
from agentctx.kernels.scores import block_scores, pool_queries
from agentctx.kernels.selection import resolve_pages, select_blocks, topk_blocks
from agentctx.memory.errors import ConfigError
from agentctx.memory.kv.pool import PAGE_TOKENS
from agentctx.runtime.layer import LayerKV
from agentctx.runtime.methods.dense import Dense

BLOCK_Q = 128  # query rows that share a list in prefill


@dataclass(frozen=True)
class BlockSparse(Dense):
    """Reads `budget` tokens of those that are stored, in whole blocks: the first, the last, and the best.

    Dense in the first `dense_layers` layers, below `dense_below` tokens, and wherever the budget holds
    everything, with the same numbers as `Dense`.
    """

    budget: int = 1024
    dense_layers: int = 2
    dense_below: int = 2048
    sink_blocks: int = 1
    local_blocks: int = 4

    def __post_init__(self) -> None:
        least = (self.sink_blocks + self.local_blocks + 1) * PAGE_TOKENS
        if self.budget < least:
            raise ConfigError(
                f"a budget of {self.budget} tokens is too small for {self.name}", hint=f"at least {least}"
            )

    def worth(self, kv: LayerKV) -> bool:
        """Whether this layer is to be read in part."""
        return (
            kv.scoring.window is None
            and kv.index >= self.dense_layers
            and kv.longest > max(self.dense_below, self.budget)
        )

    def select_decode(self, q: Tensor, kv: LayerKV, kind: str) -> Attention:
        """Decode over the blocks that score best by a summary."""
        chosen = select_blocks(
            q,
            kv.summary(kind),
            kv.table,
            kv.lens,
            self.budget // PAGE_TOKENS,
            sink_blocks=self.sink_blocks,
            local_blocks=self.local_blocks,
            scale=kv.scoring.scale,
        )
        return sparse_decode(q, kv.pages, chosen, kv.lens, scale=kv.scoring.scale, softcap=kv.scoring.softcap)

    def select_prefill(self, q: Tensor, kv: LayerKV, kind: str) -> Attention:
        """Many rows: those of a query block share the blocks that score best for their mean query."""
        rows = q.shape[2]
        offset = kv.lens - rows
        before = _diagonal(offset, rows, PAGE_TOKENS)
        scores = block_scores(
            pool_queries(q, BLOCK_Q).to(q.dtype), kv.summary(kind), kv.lens, scale=kv.scoring.scale
        )
        blocks, counts = topk_blocks(
            scores,
            before,
            self.budget // PAGE_TOKENS,
            sink_blocks=self.sink_blocks,
            local_blocks=self.local_blocks,
        )
        return self.attend_lists(q, kv, blocks, counts)

    def attend_lists(self, q: Tensor, kv: LayerKV, blocks: Tensor, counts: Tensor) -> Attention:
        """Prefill over listed blocks below the diagonal, which is always seen whole."""
        return block_sparse_prefill(
            q,
            kv.pages,
            resolve_pages(blocks, counts, kv.table),
            kv.table,
            kv.lens,
            block_q=BLOCK_Q,
            scale=kv.scoring.scale,
            softcap=kv.scoring.softcap,
        )


def _diagonal(offset: Tensor, rows: int, page_tokens: int) -> Tensor:
    """Blocks before the diagonal of each query block, int32 `[B, M]`."""
    starts = torch.arange(0, rows, BLOCK_Q, dtype=torch.int32, device=offset.device)
    return (
        torch.div(offset[:, None] + starts, page_tokens, rounding_mode="floor").clamp_min(0).to(torch.int32)
    )
