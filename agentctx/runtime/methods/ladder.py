"""LaCache: a cache of fixed size in which each layer keeps other tokens, thinned again whenever it is full.

Shi et al., "LaCache: Ladder-Shaped KV Caching for Efficient Long-Context Modeling of Large Language Models",
arXiv 2507.14204. A ladder of 1 + ceil((layers - span) / (span - overlap)) columns repeats over the cache; a
column is kept by `span` layers, the next one by those `span - overlap` layers deeper, so that together the
layers hold what each of them has dropped. Positions are those in the cache, as if nothing lay between.

Ours: all but the first tokens and the last `recent` are thinned at once when the cache is full (the public
code goes along it ladder by ladder, then starts over), a column is `width` tokens wide, and everything stays
stored, as with `streaming`: what a row reads depends on nothing but its position.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from agentctx.kernels.records import Attention
from agentctx.memory.errors import ConfigError
from agentctx.memory.kv.pool import PAGE_TOKENS
from agentctx.runtime.layer import LayerKV
from agentctx.runtime.methods.dense import Dense
from agentctx.runtime.methods.moving import holding, moved, tokens_of
from agentctx.runtime.methods.sparse import Sparse, joined

if TYPE_CHECKING:
    from agentctx.runtime.body import Body


@dataclass(frozen=True)
class Ladder(Sparse):
    """A cache of `budget` tokens; a `span` of 0 is half of the layers."""

    name: ClassVar[str] = "ladder"
    while_reading: ClassVar[bool] = True
    while_asking: ClassVar[bool] = True
    endless: ClassVar[bool] = True
    moves: ClassVar[bool] = True

    budget: int = 1024
    span: int = 0
    overlap: int = 0
    width: int = 1
    recent: int = 256
    sinks: int = 4

    def __post_init__(self) -> None:
        if min(self.span, self.overlap, self.sinks) < 0 or min(self.width, self.recent) < 1:
            raise ConfigError(f"a parameter of ladder is out of range: {self}")
        if self.overlap and self.overlap >= self.span:
            raise ConfigError(
                f"ladder: overlap is {self.overlap}, span {self.span}", hint="a smaller overlap"
            )
        if self.budget < self.sinks + self.recent + PAGE_TOKENS:
            raise ConfigError(
                f"a budget of {self.budget} tokens is too small for ladder",
                hint=f"at least {self.sinks + self.recent + PAGE_TOKENS}: sinks, recent and {PAGE_TOKENS}",
            )

    @property
    def limit(self) -> int:
        return self.budget

    def on(self, body: Body) -> tuple[Body, Dense]:
        self.keeps(0, body.shape.layers, self.budget - self.sinks - self.recent)
        return body, self

    def part(self, q: Tensor, kv: LayerKV) -> Attention:
        found, times = [], 0
        row, end = kv.longest - q.shape[2], kv.longest
        while row < end:
            kept, start = _held(self, kv.index, kv.layers, times)
            full = start + self.budget - len(kept)  # the first token that has no room
            if row < full:
                last = min(full, end)
                rows = q[:, :, row - end : last - end or None]
                found.append(self._among(rows, kv, torch.cat([kept, torch.arange(start, last)])))
                row = last
            times += 1
        return joined(found, 2) if len(found) > 1 else found[0]

    def _among(self, q: Tensor, kv: LayerKV, tokens: Tensor) -> Attention:
        """Attention of rows, the last of `tokens`, to these tokens only and each to those before it."""
        tokens, new = tokens.to(q.device), q.shape[2]
        blocks, place = torch.unique(tokens // PAGE_TOKENS, return_inverse=True)
        k, v = tokens_of(kv, blocks)
        at = place * PAGE_TOKENS + tokens % PAGE_TOKENS
        stand = torch.arange(len(tokens), device=q.device)
        k = moved(k[:, :, at], tokens, stand, kv)
        return holding(kv, k, v[:, :, at]).exact(moved(q, tokens[-new:], stand[-new:], kv))

    def keeps(self, layer: int, layers: int, count: int) -> Tensor:
        """Which of `count` tokens in a row a layer keeps, bool `[count]`.

        Raises ConfigError for a ladder that would leave a layer as full as it was.
        """
        span = self.span or -(-layers // 2)
        step = span - self.overlap
        columns = 1 - (span - layers) // step
        if (columns - 1) * step < span or columns * self.width > count:
            raise ConfigError(
                f"{self} drops nothing in some of {layers} layers",
                hint="a smaller span, overlap or width, or a larger budget",
            )
        bottom = torch.arange(count) // self.width % columns * step
        return (bottom <= layer) & (layer < bottom + span)


@lru_cache(maxsize=8192)
def _held(some: Ladder, layer: int, layers: int, times: int) -> tuple[Tensor, int]:
    """The tokens that a layer keeps after so many thinnings, int64, and the first token after them."""
    if not times:
        return torch.arange(0), 0
    before, start = _held(some, layer, layers, times - 1)
    end = start + some.budget - len(before)
    cache = torch.cat([before, torch.arange(start, end)])
    middle = slice(some.sinks, some.budget - some.recent)
    old = cache[middle][some.keeps(layer, layers, len(cache[middle]))]
    return torch.cat([cache[: some.sinks], old, cache[middle.stop :]]), end
