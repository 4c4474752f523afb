"""What a strategy must know of a model before it plans: windows, counter, abilities, rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from agentctx.memory.errors import ConfigError

Tier = Literal["reads", "writes", "judges", "plans"]


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """Facts of one model. A tier is an ability that was probed, never inferred from a name."""

    name: str
    kind: Literal["local", "endpoint", "scripted"]
    fingerprint: str  # changes when weights, template or endpoint change; part of every cache key
    context: int  # tokens the model accepts, prompt and output together
    reliable: int | None = None  # tokens it still reads well; None: not calibrated
    tiers: frozenset[Tier] = frozenset({"reads", "writes"})
    concurrency: int = 1  # calls in flight at a time
    rate_in: float = 1000.0  # tokens per second, for the estimate of seconds
    rate_out: float = 20.0
    latency: float = 0.05  # seconds per call before the first token

    def __post_init__(self) -> None:
        if self.context < 256:
            raise ConfigError(f"a context of {self.context} tokens is too small; 256 is the least")

    @property
    def writes(self) -> bool:
        """True if the model can be trusted with JSON and copied quotes."""
        return "writes" in self.tiers

    @property
    def window(self) -> int:
        """Tokens that a prompt and its answer may fill together."""
        return self.context if self.reliable is None else min(self.context, self.reliable)
