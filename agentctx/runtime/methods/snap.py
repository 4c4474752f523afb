"""SnapKV: what the last rows of a text attend to is what a question will.

Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469: the mean
attention of the last 64 rows, smoothed over neighbours. Budgets may fall with depth (Cai et al., "PyramidKV",
arXiv 2406.02069), and heads of a layer compete for all but a share of it (Feng et al., "Ada-KV", arXiv
2407.11550). Where the text ends with a question, what is kept serves that question.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from agentctx.kernels.mass import attention_mass
from agentctx.memory.errors import ConfigError
from agentctx.runtime.layer import LayerKV
from agentctx.runtime.methods.evictor import Evictor, leading, observe

if TYPE_CHECKING:
    from agentctx.runtime.context import Context


@dataclass(frozen=True)
class Snap(Evictor):
    """The last `window` rows vote, smoothed over `pool` tokens. `safeguard`: the share of its even part that
    a head keeps by its own ranking, 1 for no competition. `slope`: how much more than the mean the first
    layer keeps, and less the last.
    """

    name: ClassVar[str] = "snap"
    query_aware: ClassVar[bool] = True

    window: int = 64
    pool: int = 5
    safeguard: float = 0.2
    slope: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = 0 <= self.safeguard <= 1 and 0 <= self.slope <= 1
        if not shares or self.window < 1 or self.pool < 1 or not self.pool % 2:
            raise ConfigError(
                f"a parameter of snap is out of range: {self}",
                hint="window 1 or more, pool odd, safeguard and slope within 0 to 1",
            )

    def scores(self, context: Context) -> Tensor:
        tokens = len(context.ids)
        window = min(self.window, tokens)
        before, shape = tokens - window, context.engine.pool.shape
        found = torch.zeros(shape.layers, shape.kv_heads, before, device=shape.device)

        def see(q: Tensor, kv: LayerKV) -> None:
            scale, softcap = kv.scoring.scale, kv.scoring.softcap
            mass = attention_mass(q, kv.pages, kv.table, kv.lens, per_head=True, scale=scale, softcap=softcap)
            found[kv.index] += mass.view(shape.kv_heads, -1, mass.shape[-1])[..., :before].mean(1) / window

        observe(context, before, tokens, see)
        if before:
            found = F.avg_pool1d(found, self.pool, stride=1, padding=self.pool // 2)
        return F.pad(found, (0, window), value=torch.inf)

    def choose(self, scores: Tensor) -> Tensor:
        layers, heads, tokens = scores.shape
        slope = min(self.slope, 1 / self.keep - 1)  # no layer keeps more than there is
        kept = []
        for layer, own in enumerate(scores):
            share = self.keep * (1 + slope * (1 - 2 * layer / max(1, layers - 1)))
            sure = leading(own, int(self.safeguard * share * tokens))
            pooled = own.masked_fill(sure, torch.inf).flatten()
            kept.append(leading(pooled, round(share * tokens * heads)).view(heads, tokens))
        return torch.stack(kept)
