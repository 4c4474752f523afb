"""Quest: the extremes of each channel bound every score of a block; the blocks with the highest bounds are
read.

Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", arXiv 2406.10774. The
paper has units of 16 tokens; here a unit is a page, 64 on a CPU, which loosens the bound. Reading is dense.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from agentctx.kernels.scores import block_scores
from agentctx.runtime.layer import LayerKV
from agentctx.runtime.methods.blocks import BestBlocks
from agentctx.runtime.methods.sparse import positions


@dataclass(frozen=True)
class Quest(BestBlocks):
    """Min/max bounds of each block choose what questions and answers read; the highest of a group counts."""

    name: ClassVar[str] = "quest"

    def scores(self, q: Tensor, kv: LayerKV) -> Tensor:
        return block_scores(q, kv.summary("minmax"), kv.lens, q_pos=positions(q, kv), scale=kv.scoring.scale)
