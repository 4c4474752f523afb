"""Block top-k prefill: the mean query of 128 rows against the mean key of each block of 64.

The plain form of what XAttention, FlexPrefill and MoBA refine; they have to beat it. The mean query hides
rows that look for one thing. It changes what is stored: later layers see the outputs of sparse ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from agentctx.kernels.records import Attention
from agentctx.runtime.layer import LayerKV
from agentctx.runtime.methods.sparse import BlockSparse


@dataclass(frozen=True)
class BlockTopK(BlockSparse):
    """Means choose what a text reads of itself while it is read; generated tokens read everything."""

    name: ClassVar[str] = "blocktopk"

    @property
    def writes(self) -> str:  # type: ignore[override]
        return repr(self)

    def prefill(self, q: Tensor, kv: LayerKV) -> Attention:
        return self.select_prefill(q, kv, "mean") if self.worth(kv) else kv.exact(q)
