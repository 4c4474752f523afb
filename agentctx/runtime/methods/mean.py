"""Means of runs of keys choose the blocks: the scoring of InfLLM-V2, without its training.

OpenBMB, "InfLLM-V2: Dense-Sparse Switchable Attention for Seamless Short-to-Long Adaptation", arXiv
2509.24663. Means are over 32 keys every 16, because the mean of longer runs of rotated keys cancels the
fast channels. Here a block's score is its best run's, the maximum over the query heads of a group (the
paper sums softmaxed scores).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from agentctx.kernels.records import Attention
from agentctx.runtime.layer import LayerKV
from agentctx.runtime.methods.sparse import BlockSparse


@dataclass(frozen=True)
class Mean(BlockSparse):
    """Sub-block means choose what questions and generated tokens read."""

    name: ClassVar[str] = "mean"

    def question(self, q: Tensor, kv: LayerKV) -> Attention:
        return self.select_prefill(q, kv, "submeans") if self.worth(kv) else kv.exact(q)

    def decode(self, q: Tensor, kv: LayerKV) -> Attention:
        return self.select_decode(q, kv, "submeans") if self.worth(kv) else kv.exact(q)
