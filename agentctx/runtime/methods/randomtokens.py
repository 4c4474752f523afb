"""Random tokens stay: the anchor that every evictor has to beat. Not a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from agentctx.runtime.methods.evictor import Evictor

if TYPE_CHECKING:
    from agentctx.runtime.context import Context


@dataclass(frozen=True)
class RandomTokens(Evictor):
    """By chance from `seed`; the first `sinks` tokens stay, else the model would be lost altogether."""

    name: ClassVar[str] = "randomtokens"

    seed: int = 0
    sinks: int = 4

    def scores(self, context: Context) -> Tensor:
        shape = context.engine.pool.shape
        chance = torch.Generator().manual_seed(self.seed)
        found = torch.rand(shape.layers, shape.kv_heads, len(context.ids), generator=chance)
        found[..., : self.sinks] = torch.inf
        return found
