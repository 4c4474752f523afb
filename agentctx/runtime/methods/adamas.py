"""Adamas: two bits for each channel of every key, after a Hadamard rotation that spreads outliers.

Yan et al., "Adamas: Hadamard Sparse Attention for Efficient Long-Context Inference", arXiv 2510.18413. The
paper picks single tokens by the Manhattan distance of codes; ours keeps the precision of the query and picks
whole blocks by their best token. The thresholds come from the first 512 tokens. Reading is dense.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from agentctx.kernels.records import Attention
from agentctx.memory.errors import ModelError
from agentctx.runtime.layer import LayerKV
from agentctx.runtime.methods.blocks import BestBlocks
from agentctx.runtime.notes import SAMPLE

LEAST_HEAD = 16


@dataclass(frozen=True)
class Adamas(BestBlocks):
    """2-bit codes of rotated keys choose what questions and answers read.

    Raises ModelError (unsupported) for head sizes that are no power of two from 16 on.
    """

    name: ClassVar[str] = "adamas"
    summary: ClassVar[str] = "hadamard2"

    @property
    def limit(self) -> int:
        return max(super().limit, SAMPLE)

    def attend(self, q: Tensor, kv: LayerKV) -> Attention:
        size = kv.pages.head_dim
        if size < LEAST_HEAD or size & (size - 1):
            raise ModelError(
                f"adamas needs heads of a power of two channels, this model has {size}",
                code="unsupported",
                hint="choose quest or mean",
            )
        return super().attend(q, kv)
