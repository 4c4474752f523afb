"""Adamas: two bits for each channel of every key, after a Hadamard rotation that spreads outliers.

Yan et al., "Adamas: Hadamard Sparse Attention for Efficient Long-Context Inference", arXiv 2510.18413. The
paper picks single tokens by the Manhattan distance of codes; here the query keeps its precision and whole
blocks are picked by their best token. Reading is dense.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from agentctx.kernels.records import Attention
from agentctx.runtime.layer import LayerKV
from agentctx.runtime.methods.sparse import BlockSparse


@dataclass(frozen=True)
class Adamas(BlockSparse):
    """2-bit codes of rotated keys choose what generated tokens read; head sizes that are powers of two."""

    name: ClassVar[str] = "adamas"

    def decode(self, q: Tensor, kv: LayerKV) -> Attention:
        return self.select_decode(q, kv, "hadamard2") if self.worth(kv) else kv.exact(q)
