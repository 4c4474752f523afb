"""Means of runs of keys choose the blocks: the scoring of InfLLM-V2, without its training.

OpenBMB, "InfLLM-V2: Dense-Sparse Switchable Attention for Seamless Short-to-Long Adaptation", arXiv
2509.24663. Means are over 32 keys every 16, because the mean of longer runs of rotated keys cancels the
fast channels. A block's score is its best run's. Each query head turns scores into shares before those of a
group are added, so that no head drowns the others; here the shares are over blocks (in the paper over runs).
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
class Mean(BestBlocks):
    """Means of runs inside each block choose what questions and answers read."""

    name: ClassVar[str] = "mean"

    def scores(self, q: Tensor, kv: LayerKV) -> Tensor:
        at, scale = positions(q, kv), kv.scoring.scale
        each = block_scores(q, kv.summary("submeans"), kv.lens, per_head=True, q_pos=at, scale=scale)
        return each.softmax(-1).view(1, kv.pages.n_kv_heads, -1, *each.shape[2:]).sum(2)
