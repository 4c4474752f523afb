"""Block top-k prefill: the mean query of 128 rows against the mean key of each block of 64.

The plain form of what MoBA (arXiv 2502.13189), XAttention (arXiv 2503.16428) and FlexPrefill (arXiv
2502.20766) refine; they have to beat it. The mean query hides rows that look for one thing. It changes what
is stored: later layers see the outputs of sparse ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from agentctx.kernels.records import Attention
from agentctx.kernels.selection import topk_blocks
from agentctx.memory.kv.pool import PAGE_TOKENS
from agentctx.runtime.layer import LayerKV
from agentctx.runtime.methods.prefill import BLOCK_Q, BlockPrefill, diagonal, estimate


@dataclass(frozen=True)
class BlockTopK(BlockPrefill):
    """Means choose what a text reads of itself while it is read: `budget` tokens before the own ones."""

    name: ClassVar[str] = "blocktopk"

    def part(self, q: Tensor, kv: LayerKV) -> Attention:
        before = diagonal(q, kv)
        blocks, counts = topk_blocks(
            estimate(q, kv, before * PAGE_TOKENS - 1, BLOCK_Q),
            before,
            self.budget // PAGE_TOKENS,
            sink_blocks=self.sink_blocks,
            local_blocks=self.local_blocks,
        )
        return self.attend_lists(q, kv, blocks, counts)
