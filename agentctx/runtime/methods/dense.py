"""Exact attention over all that is stored: what every other method is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from agentctx.kernels.records import Attention
from agentctx.runtime.layer import LayerKV


@dataclass(frozen=True)
class Dense:
    """The base of every method: it overrides what it does differently."""

    name: ClassVar[str] = "dense"

    def attend(self, q: Tensor, kv: LayerKV) -> Attention:
        """Attention of new tokens q `[B, Hq, T, D]` over a layer that holds them already."""
        return kv.exact(q)
