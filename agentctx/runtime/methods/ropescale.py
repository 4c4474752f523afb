"""Rotary positions stretched by a factor, so that a text may be as many times longer than those of training.

Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation", arXiv
2306.15595; NTK-aware scaling (its authors have no paper; described in the next); Peng et al., "YaRN:
Efficient Context Window Extension of Large Language Models", arXiv 2309.00071. Without further training
quality falls. Keys hold their rotation, so a text has one table from its first token to its last: `dynamic`
scaling, which changes it while the text grows, is left out; `kind=ntk` is what it comes to in the end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from agentctx.kernels.records import Attention
from agentctx.memory.errors import ConfigError
from agentctx.runtime.layer import LayerKV
from agentctx.runtime.methods.dense import Dense
from agentctx.runtime.rotation import RopeScaling

if TYPE_CHECKING:
    from agentctx.runtime.body import Body

KINDS = ("linear", "ntk", "yarn")


@dataclass(frozen=True)
class RopeScale(Dense):
    """`factor` times the trained window, read by `inner`; `kind` is linear, ntk or yarn."""

    name: ClassVar[str] = "ropescale"

    kind: str = "yarn"
    factor: float = 4.0
    inner: Dense = Dense()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            hint = "ntk has one table for the whole text" if self.kind == "dynamic" else ", ".join(KINDS)
            raise ConfigError(f"there is no rope scaling {self.kind!r} here", hint=hint)
        if not 1 <= self.factor <= 1000:
            raise ConfigError(f"ropescale: factor is {self.factor}", hint="1 or more, such as 4")

    @property
    def moves(self) -> bool:  # type: ignore[override]
        return self.inner.moves

    @property
    def endless(self) -> bool:  # type: ignore[override]
        return self.inner.endless

    @property
    def writes(self) -> str:
        return f"{self.name} {self.kind} {self.factor} {self.inner.writes}"

    @property
    def grid(self) -> int:
        return self.inner.grid

    def on(self, body: Body) -> tuple[Body, Dense]:
        body, inner = self.inner.on(body.rescaled(RopeScaling(self.kind, self.factor)))
        return body, replace(self, inner=inner)

    def over(self, inner: Dense) -> Dense:
        return super().over(inner) if inner.evicts else replace(self, inner=inner)

    def reach(self, window: int) -> int:
        return self.inner.reach(window)

    def attend(self, q: Tensor, kv: LayerKV) -> Attention:
        return self.inner.attend(q, kv)
