"""Random blocks: the anchor that every method has to beat. Not a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from agentctx.memory.kv.pool import PAGE_TOKENS
from agentctx.runtime.layer import LayerKV
from agentctx.runtime.methods.blocks import BestBlocks
from agentctx.runtime.methods.sparse import positions

_MIX = 0x2545F4914F6CDD1D  # an odd 63-bit number with no pattern


@dataclass(frozen=True)
class Random(BestBlocks):
    """Blocks by a hash of seed, layer, head, position and block: first, last and budget as elsewhere."""

    name: ClassVar[str] = "random"

    seed: int = 0

    def scores(self, q: Tensor, kv: LayerKV) -> Tensor:
        blocks = torch.arange(-(-kv.longest // PAGE_TOKENS), device=q.device)
        heads = torch.arange(kv.pages.n_kv_heads, device=q.device)[:, None, None]
        x = torch.full((1,), self.seed * 1009 + kv.index, device=q.device)
        for part in (heads, positions(q, kv).long()[..., None], blocks):
            x = _mixed(x + part)
        return (x & 0xFFFFFF).float()[None]


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ (x >> 29)) * _MIX  # products wrap around
    return x ^ (x >> 32)
