"""TriangleMix: in the deeper layers a text sees its beginning and its neighbourhood while it is read.

He et al., "TriangleMix: Accelerating Prefilling via Decoding-time Contribution Sparsity", arXiv 2507.21526.
The last rows of a prompt, which the paper lets see everything, are what is asked after reading: questions are
dense (ours). It changes what is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from agentctx.kernels.prefill import window_prefill
from agentctx.kernels.records import Attention
from agentctx.memory.errors import ConfigError
from agentctx.runtime.layer import LayerKV
from agentctx.runtime.methods.sparse import Sparse


@dataclass(frozen=True)
class Triangle(Sparse):
    """From the share `start` of the layers on: the first `sinks` tokens and the last `local`, past
    `dense_below`.
    """

    name: ClassVar[str] = "triangle"
    while_reading: ClassVar[bool] = True

    start: float = 0.5
    sinks: int = 8
    local: int = 512
    dense_below: int = 2048

    def __post_init__(self) -> None:
        if not 0 <= self.start <= 1 or self.sinks < 0 or self.local < 1 or self.dense_below < 0:
            raise ConfigError(f"a parameter of triangle is out of range: {self}")

    @property
    def limit(self) -> int:
        return max(self.dense_below, self.sinks + self.local)

    def serves(self, kv: LayerKV) -> bool:
        return super().serves(kv) and kv.index >= self.start * kv.layers

    def part(self, q: Tensor, kv: LayerKV) -> Attention:
        scoring = kv.scoring
        return window_prefill(
            q,
            kv.pages,
            kv.table,
            kv.lens,
            window=self.local,
            sink_tokens=self.sinks,
            scale=scoring.scale,
            softcap=scoring.softcap,
        )
