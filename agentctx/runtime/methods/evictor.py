"""What every evictor has in common: a text is read whole, scored, and asked through what is kept of it.

A score says how much a token is worth to one KV head of one layer, so heads keep different tokens, and are
stored as ragged as that (`memory.kv.past`). What is kept keeps its position. The full blocks are those of
dense attention and stay where they are: an evicted reading is derived from them and never stored as one.
Queries that a score needs are computed again from the stored keys, a few windows of rows, so it does not
matter in which pieces a text was read, or whether it was read at all in this process. What was chosen is
remembered while the engine lives (`memory.kv.choices`); it is not written to the disk, where only the full
blocks are, from which it follows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from agentctx.kernels.records import Attention
from agentctx.memory.errors import ConfigError, ModelError
from agentctx.memory.kv.chain import blocks
from agentctx.memory.kv.gather import Part, gather
from agentctx.memory.kv.past import Past
from agentctx.runtime.layer import LayerKV
from agentctx.runtime.methods.dense import Dense

if TYPE_CHECKING:
    from agentctx.runtime.context import Context

See = Callable[[Tensor, LayerKV], None]  # queries [1, Hq, T, D] of the last rows of a layer


@dataclass(frozen=True)
class Evictor(Dense):
    """Of a text of more than `dense_below` tokens the share `keep` stays, in (0, 1]."""

    evicts: ClassVar[bool] = True

    keep: float = 0.25
    dense_below: int = 1024

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1 or self.dense_below < 0:
            raise ConfigError(
                f"{self.name}: keep is {self.keep}, dense_below {self.dense_below}",
                hint="keep within (0, 1], dense_below 0 or more",
            )

    @abstractmethod
    def scores(self, context: Context) -> Tensor:
        """The worth of each token, float32 `[layers, Hkv, N]`; what is infinite stays in any case."""

    def choose(self, scores: Tensor) -> Tensor:
        """Which tokens stay, bool like `scores`: here as many in every head."""
        return leading(scores, round(self.keep * scores.shape[-1]))

    def reduce(self, context: Context, tokens: int, asked: Sequence[int] = ()) -> Context:
        cancelled = len(context.ids) < tokens
        if cancelled or tokens <= self.dense_below or self.keep == 1:
            return context
        found = compress(context, self, asked=asked if self.query_aware else ())
        found.computed, found.reused, found.warnings = context.computed, context.reused, context.warnings
        context.close()
        return found


def compress(
    context: Context, evictor: Evictor, keep: float | None = None, asked: Sequence[int] = ()
) -> Context:
    """What an evictor leaves of what was read; the original stays as it is. With `asked`, it is scored as if
    these tokens came after it: it serves them then, and others less.

    Raises ModelError (unsupported) for layers with a window and for tokens that were chosen already,
    out_of_memory where what is kept does not fit beside the original; ConfigError for a `keep` out of range.
    """
    if context.state.pasts[0]:
        raise ModelError(
            "this reading holds chosen tokens already", code="unsupported", hint="start from the full reading"
        )
    if not context.ids:
        raise ConfigError("an empty reading cannot be compressed", hint="read a text first")
    chosen = evictor if keep is None else replace(evictor, keep=keep)
    engine, tokens = context.engine, len(context.ids)
    with engine.lock, torch.inference_mode():
        name = list(blocks([*context.ids, *asked], f"{engine.root} {chosen!r} {len(asked)}"))[-1].name
        kept = engine.choices.get(name)
        if kept is None:
            _refuse_windows(context)
            kept = chosen.choose(_scores(context, chosen, asked))
            engine.choices.put(name, kept)
        source = Past.over(context.table)
        try:
            past = gather([Part(source, kept)], end=tokens)
        finally:
            source.close()
    return type(context).over(engine, past, context.ids)


def _scores(context: Context, evictor: Evictor, asked: Sequence[int]) -> Tensor:
    if not asked:
        return evictor.scores(context)
    fork = context.fork()
    try:
        fork.feed(asked)
        return evictor.scores(fork)[..., : len(context.ids)]
    finally:
        fork.close()


def observe(context: Context, start: int, end: int, see: See, *, moves: bool = False) -> None:
    """Show the queries of the tokens `start` to `end` in every layer, computed anew; nothing changes.

    With `moves`, the layers' rotations are known in `scoring`.
    """
    fork = context.fork()
    try:
        fork.crop(start)
        show(fork, context.ids[start:end], see, moves=moves)
    finally:
        fork.close()


def show(context: Context, ids: list[int], see: See, *, moves: bool = False) -> None:
    """Append tokens, and show their queries in every layer, piece by piece."""
    before = context.state.method
    context.state.method = (_Turning if moves else Watching)(see)
    try:
        context.feed(ids)
    finally:
        context.state.method = before


@dataclass(frozen=True)
class Watching(Dense):
    """Dense attention that shows the queries of every layer without a window to `see`."""

    see: See

    def attend(self, q: Tensor, kv: LayerKV) -> Attention:
        self.see(q, kv)
        return kv.exact(q)


@dataclass(frozen=True)
class _Turning(Watching):
    moves: ClassVar[bool] = True


def _refuse_windows(context: Context) -> None:
    """Layers with a window do not go with chosen tokens: told before anything is evicted."""
    seen: list[int] = []
    tokens = len(context.ids)
    observe(context, tokens - 1, tokens, lambda q, kv: seen.append(kv.index))
    if len(seen) < context.engine.pool.shape.layers:
        raise ModelError(
            "this model has layers with a window, of which no tokens can be evicted",
            code="unsupported",
            hint="choose dense, or a model without sliding windows",
        )


def by_layer(context: Context, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Scores `[Hkv, N]` of the keys and values `[Hkv, N, D]` of each layer, in float32."""
    source, tokens = Past.over(context.table), len(context.ids)
    try:
        layers = range(context.engine.pool.shape.layers)
        return torch.stack([score(*(x[:, :tokens].float() for x in source.read(i))) for i in layers])
    finally:
        source.close()


def leading(scores: Tensor, count: int) -> Tensor:
    """The `count` highest along the last axis, and all that are infinite: bool. The first of equals."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True) | scores.isposinf()
