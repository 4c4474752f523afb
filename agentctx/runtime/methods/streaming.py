"""StreamingLLM: the first tokens and the last, at positions as if nothing lay between them.

Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453. Only distances
matter to rotary positions, so the window keeps its true ones and the query is turned for the first tokens
instead: two attentions, merged. What lies between cannot be recalled; a text may be longer than the model's
window. Ours: exact for every token while reading, and everything stays stored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from agentctx.kernels.merge import merge_lse
from agentctx.kernels.records import Attention
from agentctx.kernels.tokens import pseudo_attention
from agentctx.memory.errors import ConfigError
from agentctx.memory.kv.pool import PAGE_TOKENS
from agentctx.runtime.layer import LayerKV
from agentctx.runtime.methods.moving import moved, tokens_of
from agentctx.runtime.methods.sparse import Sparse, positions


@dataclass(frozen=True)
class Streaming(Sparse):
    """`sinks` first tokens and a `window` of the last, the own included.

    Raises ModelError (unsupported) for a layer whose rotation is not known.
    """

    name: ClassVar[str] = "streaming"
    while_reading: ClassVar[bool] = True
    while_asking: ClassVar[bool] = True
    endless: ClassVar[bool] = True
    moves: ClassVar[bool] = True

    sinks: int = 4
    window: int = 1020

    def __post_init__(self) -> None:
        if not 0 < self.sinks <= PAGE_TOKENS or self.window < 1:
            raise ConfigError(
                f"{self.name}: sinks is {self.sinks}, window {self.window}",
                hint=f"1 to {PAGE_TOKENS} sinks, a window of 1 or more",
            )

    @property
    def limit(self) -> int:
        return self.sinks + self.window

    def part(self, q: Tensor, kv: LayerKV) -> Attention:
        near = replace(kv, scoring=replace(kv.scoring, window=self.window)).exact(q)
        return merge_lse([near, self.sink_attention(q, kv)])

    def sink_attention(self, q: Tensor, kv: LayerKV) -> Attention:
        """Attention to the first tokens only, from where the rows are made to stand."""
        k, v = first_tokens(kv, self.sinks)
        return given_attention(moved(q, positions(q, kv)[0], self.limit - 1, kv), k, v, kv)


def first_tokens(kv: LayerKV, count: int) -> tuple[Tensor, Tensor]:
    """K and V `[1, Hkv, count, D]` of the first tokens of a sequence, from its first page."""
    k, v = tokens_of(kv, torch.zeros(1, dtype=torch.int64, device=kv.table.device))
    return k[:, :, :count], v[:, :, :count]


def given_attention(q: Tensor, k: Tensor, v: Tensor, kv: LayerKV) -> Attention:
    """Attention of every row to all of a few keys."""
    equal = torch.zeros(k.shape[:3], device=k.device)
    return pseudo_attention(q, k, v, equal, scale=kv.scoring.scale, softcap=kv.scoring.softcap)
