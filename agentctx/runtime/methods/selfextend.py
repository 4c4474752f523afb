"""Self-Extend: near tokens at their positions, far ones in groups that share a position.

Jin et al., "LLM Maybe LongLM: Self-Extend LLM Context Window Without Tuning", arXiv 2401.01325. With a
neighbourhood w and groups of g, a token at a distance below w keeps it; one farther away, at j as seen from
i, is at the distance i // g + w - w // g - j // g. Both parts are attended exactly and merged. No distance
exceeds the model's window for texts of up to g (window - w + w // g) tokens. Keys are stored where they
stand; those of the groups are turned when they are needed, layer by layer, which costs about as much again
as reading them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from agentctx.kernels.merge import merge_lse
from agentctx.kernels.records import Attention
from agentctx.memory.errors import ConfigError
from agentctx.memory.kv.pool import PAGE_TOKENS
from agentctx.runtime.layer import LayerKV
from agentctx.runtime.methods.dense import Dense
from agentctx.runtime.methods.moving import holding, moved, tokens_of
from agentctx.runtime.methods.sparse import Sparse, positions

if TYPE_CHECKING:
    from agentctx.runtime.body import Body


@dataclass(frozen=True)
class SelfExtend(Sparse):
    """The last `window` tokens where they are, those before in groups of `group`.

    A group of 0 is chosen for texts of `tokens`: the smallest with which distances stay within half of the
    model's window, the lower end of what the paper recommends.
    """

    name: ClassVar[str] = "selfextend"
    while_reading: ClassVar[bool] = True
    while_asking: ClassVar[bool] = True
    moves: ClassVar[bool] = True

    group: int = 0
    window: int = 1024
    tokens: int = 32768

    def __post_init__(self) -> None:
        if self.group < 0 or self.window < 1 or self.tokens < 1:
            raise ConfigError(f"a parameter of selfextend is out of range: {self}")

    @property
    def limit(self) -> int:
        return self.window

    def on(self, body: Body) -> tuple[Body, Dense]:
        near, half = self.window, body.window // 2
        if near >= half:
            raise ConfigError(
                f"selfextend: a window of {near} tokens leaves no room in the model's {body.window}",
                hint=f"a window below {half}",
            )
        chosen = self.group or max(1, -(-(self.tokens - near) // (half - near)))
        return body, replace(self, group=chosen)

    def reach(self, window: int) -> int:
        return max(window, self.group * (window - self.window + self.window // self.group))

    def part(self, q: Tensor, kv: LayerKV) -> Attention:
        near = replace(kv, scoring=replace(kv.scoring, window=self.window)).exact(q)
        return merge_lse([near, self.grouped(q, kv)])

    def grouped(self, q: Tensor, kv: LayerKV) -> Attention:
        """Attention to the tokens at a distance of the window or more."""
        far = kv.longest - self.window
        k, v = tokens_of(kv, torch.arange(-(-far // PAGE_TOKENS), device=q.device))
        stand = torch.arange(far, dtype=torch.int32, device=q.device)
        k = moved(k[:, :, :far], stand, stand // self.group, kv)
        at = positions(q, kv)[0]
        q = moved(q, at, at // self.group + self.window - self.window // self.group, kv)
        return holding(kv, k, v[:, :, :far]).exact(q)
