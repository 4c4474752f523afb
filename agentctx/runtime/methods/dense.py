"""Exact attention over all that is stored: what every other method is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from agentctx.kernels.records import Attention
from agentctx.runtime.layer import DECODE_TOKENS, LayerKV


@dataclass(frozen=True)
class Dense:
    """The base of every method: it overrides what it does differently.

    `writes` names what changes the stored keys and values; readings made under different values are never
    mixed. Methods that only read differently leave it empty, and one reading serves them all.
    """

    name: ClassVar[str] = "dense"
    writes: ClassVar[str] = ""

    def attend(self, q: Tensor, kv: LayerKV) -> Attention:
        """Attention of new tokens q `[B, Hq, T, D]` over a layer that holds them already."""
        if q.shape[2] <= DECODE_TOKENS:
            return self.decode(q, kv)
        return self.prefill(q, kv) if kv.reading else self.question(q, kv)

    def prefill(self, q: Tensor, kv: LayerKV) -> Attention:
        """Reading a text."""
        return kv.exact(q)

    def question(self, q: Tensor, kv: LayerKV) -> Attention:
        """Many tokens over a text that was read before."""
        return kv.exact(q)

    def decode(self, q: Tensor, kv: LayerKV) -> Attention:
        """A few tokens, while generating."""
        return kv.exact(q)
