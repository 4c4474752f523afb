"""Eviction by keys and values alone, without a query: cheap, and the same whatever is asked.

Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
Resource-Constrained Environments", arXiv 2504.15364: keys unlike the mean key stay.

Liang et al., "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important", arXiv
2504.04704: tokens whose channels spread widely on the scale of the partition after theirs stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from agentctx.memory.errors import ConfigError
from agentctx.runtime.methods.evictor import Evictor, by_layer

if TYPE_CHECKING:
    from agentctx.runtime.context import Context


@dataclass(frozen=True)
class KeyDiff(Evictor):
    """By the cosine to the mean of the unit keys, of the text as a whole."""

    name: ClassVar[str] = "keydiff"

    def scores(self, context: Context) -> Tensor:
        return by_layer(context, _unlikeness)


def _unlikeness(k: Tensor, v: Tensor) -> Tensor:
    mean = F.normalize(k, dim=-1).mean(1, keepdim=True)
    return -F.cosine_similarity(k, mean, dim=-1)


@dataclass(frozen=True)
class LagKV(Evictor):
    """The first `sinks` tokens and the last partition of `lag`, with what is left after it, stay whole; of
    every other partition as many tokens.
    """

    name: ClassVar[str] = "lagkv"

    lag: int = 128
    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lag < 2 or self.sinks < 0:
            raise ConfigError(f"lagkv: lag is {self.lag}, sinks {self.sinks}", hint="at least 2 and 0")

    def scores(self, context: Context) -> Tensor:
        return by_layer(context, self._ranks)

    def _ranks(self, k: Tensor, v: Tensor) -> Tensor:
        """The place of each token in its own partition, the best first: minus 0, 1, ..."""
        heads, tokens, _ = k.shape
        found = torch.full((heads, tokens), torch.inf, device=k.device)
        parts = max(0, tokens - self.sinks) // self.lag
        if parts < 2:
            return found
        end = self.sinks + parts * self.lag
        keys, values = (x[:, self.sinks : end].reshape(heads, parts, self.lag, -1) for x in (k, v))
        worth = self._spread(keys) + self._spread(values)
        order = worth.argsort(dim=-1, descending=True, stable=True)
        found[:, self.sinks : end - self.lag] = -order.argsort(-1).flatten(1).float()
        return found

    @staticmethod
    def _spread(x: Tensor) -> Tensor:
        """Shares `[H, parts - 1, lag]` by the deviation over channels, of partitions `[H, parts, lag, D]`."""
        low, high = x[:, 1:].amin(2, keepdim=True), x[:, 1:].amax(2, keepdim=True)
        scaled = (x[:, :-1] - low) / (high - low).clamp_min(1e-6)
        return scaled.std(-1).softmax(-1)
