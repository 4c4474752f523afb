"""Reading in blocks: what the methods that make a text read a part of itself share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from agentctx.kernels.prefill import block_sparse_prefill
from agentctx.kernels.records import Attention
from agentctx.kernels.scores import block_scores, pool_queries
from agentctx.kernels.selection import resolve_pages
from agentctx.memory.errors import ConfigError
from agentctx.memory.kv.pool import PAGE_TOKENS
from agentctx.runtime.layer import LayerKV
from agentctx.runtime.methods.sparse import Sparse

BLOCK_Q = 128  # rows that share a list


@dataclass(frozen=True)
class BlockPrefill(Sparse):
    """Runs of 128 rows share a list of the blocks before them; their own are always seen.

    Dense in the first `dense_layers` layers and for the first `dense_below` tokens.
    """

    while_reading: ClassVar[bool] = True

    budget: int = 1024
    dense_layers: int = 2
    dense_below: int = 2048
    sink_blocks: int = 1
    local_blocks: int = 1

    def __post_init__(self) -> None:
        if min(self.dense_layers, self.dense_below, self.sink_blocks, self.local_blocks) < 0:
            raise ConfigError(f"a parameter of {self.name} is below 0: {self}")
        least = (self.sink_blocks + self.local_blocks + 1) * PAGE_TOKENS
        if self.budget < least:
            raise ConfigError(
                f"a budget of {self.budget} tokens is too small for {self.name}", hint=f"at least {least}"
            )

    @property
    def grid(self) -> int:
        return BLOCK_Q

    @property
    def limit(self) -> int:
        return -(-max(self.dense_below, self.budget) // self.grid) * self.grid

    def serves(self, kv: LayerKV) -> bool:
        return super().serves(kv) and kv.index >= self.dense_layers

    def attend_lists(self, q: Tensor, kv: LayerKV, blocks: Tensor, counts: Tensor) -> Attention:
        """Attention over lists `[1, Hkv, M, S]` of blocks below the diagonal, and the diagonal."""
        chosen = resolve_pages(blocks, counts, kv.table)
        return block_sparse_prefill(
            q,
            kv.pages,
            chosen,
            kv.table,
            kv.lens,
            block_q=BLOCK_Q,
            scale=kv.scoring.scale,
            softcap=kv.scoring.softcap,
        )


def diagonal(q: Tensor, kv: LayerKV) -> Tensor:
    """Blocks before the diagonal of each run of rows, int32 `[1, M]`."""
    starts = torch.arange(kv.longest - q.shape[2], kv.longest, BLOCK_Q, dtype=torch.int32, device=q.device)
    return torch.div(starts, PAGE_TOKENS, rounding_mode="floor")[None]


def estimate(q: Tensor, kv: LayerKV, limits: Tensor, rows: int) -> Tensor:
    """Shares of the blocks that begin at most at `limits [1, M]`, for the mean query of each run of rows.

    From mean keys; the mean of the shares over the query heads of a group, float32 `[1, Hkv, M, NB]`.
    """
    pooled = pool_queries(q, rows).to(q.dtype)
    summary, scale = kv.summary("mean"), kv.scoring.scale
    each = block_scores(pooled, summary, kv.lens, per_head=True, q_pos=limits, scale=scale)
    shares = each.softmax(-1)  # NaN where no block is before
    return shares.nan_to_num(0.0).view(1, kv.pages.n_kv_heads, -1, *shares.shape[2:]).mean(2)
