"""Expected attention: what a later query would attend to, if queries are Gaussian and stand ahead.

Devoto, Jeblick and Jegou, "Expected Attention: KV Cache Compression by Estimating Attention from Future
Queries Distribution", arXiv 2510.00636. With mean and covariance of the unturned queries, and the mean
rotation over the positions to come, the score of a key is the share that it has of the expectations of
exp(s q k), times the norm of its value.

Ours: the statistics are those of windows of 64 rows spread evenly over the text, not of all its rows, which
would be a second reading.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from agentctx.memory.errors import ConfigError, ModelError
from agentctx.runtime.layer import LayerKV, Scoring
from agentctx.runtime.methods.evictor import Evictor, by_layer, observe

if TYPE_CHECKING:
    from agentctx.runtime.context import Context

WINDOW = 64


@dataclass(slots=True)
class Queries:
    """Sums over the unturned queries `[Hq, n, D]` of a layer, in float64, and what turns them."""

    scoring: Scoring
    count: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(()))
    products: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, q: Tensor) -> None:
        rows = q.double()
        self.count += rows.shape[1]
        self.sums = self.sums + rows.sum(1)
        self.products = self.products + rows.mT @ rows

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean `[Hq, D]` and covariance `[Hq, D, D]`."""
        mean = self.sums / self.count
        return mean, self.products / self.count - mean[:, :, None] * mean[:, None, :]


@dataclass(frozen=True)
class Expected(Evictor):
    """Queries of `rows` rows, after the first `sinks`, are expected at the next `ahead` positions."""

    name: ClassVar[str] = "expected"

    rows: int = 1024
    ahead: int = 512
    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows < WINDOW or self.ahead < 1 or self.sinks < 0:
            raise ConfigError(
                f"expected: rows is {self.rows}, ahead {self.ahead}, sinks {self.sinks}",
                hint=f"at least {WINDOW}, 1 and 0",
            )

    def scores(self, context: Context) -> Tensor:
        tokens = len(context.ids)
        layers = iter(self.statistics(context))

        def score(k: Tensor, v: Tensor) -> Tensor:
            queries = next(layers)
            mean, covariance = ahead(queries, tokens, self.ahead)
            size = (len(k), -1, *mean.shape[1:])
            mean, covariance = mean.view(size).float(), covariance.view(*size, size[-1]).float()
            scale = queries.scoring.scale
            logits = scale * torch.einsum("hgd,hnd->hgn", mean, k)
            logits += 0.5 * scale**2 * torch.einsum("hnd,hgde,hne->hgn", k, covariance, k)
            found: Tensor = logits.softmax(-1).mean(1) * v.norm(dim=-1)
            found[:, : self.sinks] = torch.inf
            return found

        return by_layer(context, score)

    def statistics(self, context: Context) -> list[Queries]:
        """Of each layer."""
        found: dict[int, Queries] = {}
        tokens, first = len(context.ids), min(self.sinks, len(context.ids) - 1)

        def see(q: Tensor, kv: LayerKV) -> None:
            rotation = kv.scoring.rotation
            if rotation is None:
                raise ModelError(
                    f"the rotation of positions in layer {kv.index} is not known, expected needs it",
                    code="unsupported",
                    hint="choose snap or keydiff",
                )
            at = torch.arange(kv.longest - q.shape[2], kv.longest, device=q.device)
            plain = rotation.move(q, at, torch.zeros_like(at))
            found.setdefault(kv.index, Queries(kv.scoring)).add(plain[0])

        count = self.rows // WINDOW
        if tokens - first <= count * WINDOW:
            observe(context, first, tokens, see, moves=True)
        else:
            for start in torch.linspace(first, tokens - WINDOW, count).long().tolist():
                observe(context, start, start + WINDOW, see, moves=True)
        return [found[layer] for layer in sorted(found)]


def ahead(queries: Queries, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance under the mean rotation of the `count` positions from `start` on."""
    mean, covariance = queries.moments()
    rotation, size = queries.scoring.rotation, mean.shape[-1]
    assert rotation is not None  # the statistics would not be there
    basis = torch.eye(size, device=mean.device)[None, :, None].expand(1, size, count, size).contiguous()
    to = torch.arange(start, start + count, device=mean.device)
    turned = rotation.move(basis, torch.zeros_like(to), to)[0].mean(1).double()  # a row: one channel, turned
    return mean @ turned, turned.T @ covariance @ turned
