"""Quest: the extremes of each channel bound every score of a block; the blocks with the highest bounds are
read.

Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", arXiv 2406.10774. The
paper has units of 16 tokens; here a unit is a page, 64 on a CPU, which loosens the bound. Reading is dense.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from agentctx.kernels.records import Attention
from agentctx.runtime.layer import LayerKV
from agentctx.runtime.methods.sparse import BlockSparse


@dataclass(frozen=True)
class Quest(BlockSparse):
    """Min/max bounds of each block choose what questions and generated tokens read."""

    name: ClassVar[str] = "quest"

    def question(self, q: Tensor, kv: LayerKV) -> Attention:
        return self.select_prefill(q, kv, "minmax") if self.worth(kv) else kv.exact(q)

    def decode(self, q: Tensor, kv: LayerKV) -> Attention:
        return self.select_decode(q, kv, "minmax") if self.worth(kv) else kv.exact(q)
