"""Tokens of a passage, computed anew where it stands (after CacheBlend, Yao et al., arXiv 2405.16444).

A passage that was read by itself did not see what stands before it now. The first layer, computed for all of
it here, says for which of its tokens that makes a difference to the second, and only those go through all
layers. Cost, for a share r of n tokens and L layers: r n tokens, n tokens through one layer of L, and two
passes more for each passage.

In benchmarks/results/corpus.json (16 prompts, the embedded model) r = .15 brings the answer's distributions
nearer to those of one piece than as many tokens at random (13 of 16) or none (16 of 16), but no nearer than
the first 16 tokens of each passage, which cost less time. So it is off unless it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from agentctx.kernels.decode import dense_decode
from agentctx.kernels.records import Attention
from agentctx.kernels.store import write_kv
from agentctx.memory.kv.table import stacked
from agentctx.runtime.context import Context
from agentctx.runtime.layer import Scoring
from agentctx.runtime.methods.dense import Dense
from agentctx.runtime.state import KVState

LAYER = 1  # whose keys and values are compared: the first that depends on what stands before


def changes(context: Context, start: int, k: Tensor, v: Tensor) -> Tensor:
    """How far the tokens of a context from `start` on, whose keys and values `[layers, Hkv, n, D]` are given,
    are from what they would be in `LAYER` if they were computed.

    Returns float32 `[n]`: squared distances of both, each in its own mean square; 0 without such a layer.
    """
    engine = context.engine
    if len(k) <= LAYER:
        return torch.zeros(k.shape[2])
    with engine.lock, torch.inference_mode():
        table = context.table.fork()
        table.crop(start)
        state = _Until(engine.pool, [table], Dense(), [start], reading=True)
        try:
            engine.body.forward(torch.tensor([context.ids[start:]]), state)
        except _Reached as reached:
            pairs = [(new[0].float(), old[LAYER].float()) for new, old in ((reached.k, k), (reached.v, v))]
            return torch.stack([(a - b).square().mean((0, 2)) / a.square().mean() for a, b in pairs]).sum(0)
        finally:
            state.close()
    raise ValueError("the body did not hand its keys to the state")


def compute_anew(context: Context, at: Tensor) -> None:
    """Compute the tokens at the places `at` (int64 `[n]`, rising) of a context again, in one pass.

    Each attends densely to all that stands before it; their new keys and values take the place of the old
    ones. The pages they lie in must be the context's own.
    """
    engine = context.engine
    ids = torch.tensor(context.ids)[at]
    with engine.lock, torch.inference_mode():
        state = _Places(engine.pool, [context.table], Dense(), [0], at=at.to(engine.pool.shape.device))
        engine.body.forward(ids[None], state)
    context.computed += len(at)


class _Reached(Exception):
    """A pass has come to `LAYER`, whose keys and values these are."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        super().__init__()
        self.k, self.v = k, v


@dataclass
class _Until(KVState):
    """Ends a pass at `LAYER`, by raising `_Reached`: no body needs to know of it."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Attention:
        if layer == LAYER:
            raise _Reached(k, v)
        return super().attend(layer, q, k, v, scoring)


@dataclass
class _Places(KVState):
    """The columns of a pass are tokens at the places `at` of its one table, which holds them already."""

    at: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def positions(self, new: int) -> Tensor:
        return self.at[None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Attention:
        pages, table = self.pool.into(layer, self.pool.where(stacked(self.tables).to(q.device)))
        cuts = ((self.at.diff() != 1).nonzero()[:, 0] + 1).tolist()
        runs = (self.at.to(torch.int32).tensor_split(cuts), k.tensor_split(cuts, 2), v.tensor_split(cuts, 2))
        for at, some_k, some_v in zip(*runs, strict=True):
            write_kv(pages, some_k, some_v, table, at[:1])
        lens = (self.at + 1).to(torch.int32)  # each is a sequence that ends with it
        first = None if scoring.window is None else (lens - scoring.window).clamp_min(0)
        rows = q.transpose(0, 2).contiguous()
        found = dense_decode(
            rows,
            pages,
            table.expand(len(lens), -1).contiguous(),
            lens,
            first_pos=first,
            scale=scoring.scale,
            softcap=scoring.softcap,
        )
        return Attention(found.out.transpose(0, 2), found.lse.transpose(0, 2))
