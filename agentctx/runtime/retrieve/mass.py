"""How much attention the tokens that are held get from what is asked about them.

The rows of a question attend to a text as they do when it is answered; here is looked where. A layer's lse of
those rows first, then its keys once more, adding up columns: the matrix of rows by tokens never exists.
Attention is exact, whatever the method of the contexts, which are left as they were.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from agentctx.kernels.mass import attention_mass
from agentctx.memory.errors import ModelError
from agentctx.memory.kv.past import Past
from agentctx.runtime.context import Context
from agentctx.runtime.engine import Engine
from agentctx.runtime.layer import LayerKV, attend_past
from agentctx.runtime.methods.evictor import Watching, observe


def attended(
    contexts: Sequence[Context], ids: Sequence[int], *, rows: int, heads: Tensor | None = None
) -> Tensor:
    """The share of its attention that each held token gets from the last `rows` of `ids`, mean over them.

    `ids` are fed after each of the contexts, all in one batch. `heads` float32 `[layers, Hq]` weighs the
    heads, which are added up: float32 `[B, N]`, N the tokens of the longest context, 0 where another has
    none; without it `[B, layers, Hq, N]`, 0 for layers that see a window only. Tokens of a past stand in its
    order (`memory.kv.gather.slots`), and go with one context alone.

    Raises ModelError: overflow beyond the model's own window, unsupported for heads that hold different
    tokens, out_of_memory.
    """
    engine, held = contexts[0].engine, [_held(context) for context in contexts]
    shape = engine.pool.shape
    whole = max(held) + len(ids)
    if whole > engine.body.window:
        raise ModelError(
            f"{whole:,} tokens exceed the {engine.body.window:,} that the model attends to exactly",
            code="overflow",
            hint="score spans of a shorter text",
        )
    layers = () if heads is not None else (shape.layers,)
    found: Tensor | None = None

    def see(q: Tensor, kv: LayerKV) -> None:
        nonlocal found
        weights = None if heads is None else heads[kv.index].to(q.device)
        if weights is not None and not bool(weights.any()):
            return
        past = contexts[0].state.pasts[0]
        mass = _over_past(q, kv, past) if past else _over_table(q, kv)
        mass = F.pad(mass, (0, max(0, max(held) - mass.shape[-1])))[..., : max(held)] / rows
        if found is None:
            found = mass.new_zeros(len(mass), *layers, *(mass.shape[1:] if layers else mass.shape[2:]))
        if weights is None:
            found[:, kv.index] += mass
        else:
            found += (mass * weights[:, None]).sum(1)

    twins = [context.fork() for context in contexts]
    try:
        _feed(twins, ids[:-rows], Watching(_nothing))
        _feed(twins, ids[-rows:], Watching(see))
    finally:
        for twin in twins:
            twin.close()
    if found is None:
        raise _blind()
    inside = torch.arange(max(held)) < torch.tensor(held)[:, None]  # and not what was asked
    return found * inside.view(len(held), *[1] * (found.dim() - 2), -1).to(found.device)


def query_heads(engine: Engine) -> int:
    """Hq of the model, which only its queries tell."""
    seen: list[int] = []
    context, _ = engine.begin([0])
    try:
        observe(context, 0, 1, lambda q, kv: seen.append(q.shape[1]))
    finally:
        context.close()
    if not seen:
        raise _blind()
    return seen[0]


def _held(context: Context) -> int:
    """Tokens that a context holds; the same in every head."""
    past, tokens = context.state.pasts[0], context.table.tokens
    if past is None:
        return tokens
    if tokens or not past.same:
        raise ModelError(
            "the heads of this reading hold different tokens: nothing can be said of a token",
            code="unsupported",
            hint="score the full reading",
        )
    return past.longest


def _feed(contexts: Sequence[Context], ids: Sequence[int], method: Watching) -> None:
    engine = contexts[0].engine
    for context in contexts:
        context.state.method = method
    for start in range(0, len(ids), engine.chunk):
        piece = list(ids[start : start + engine.chunk])
        engine.step(contexts, torch.tensor([piece] * len(contexts)))


def _over_table(q: Tensor, kv: LayerKV) -> Tensor:
    """Masses `[B, Hq, N]`, summed over the rows of q."""
    scoring = kv.scoring
    lse = None
    if scoring.sinks is not None:
        lse = torch.logaddexp(kv.exact(q).lse, scoring.sinks.float()[None, :, None])
    return attention_mass(
        q,
        kv.pages,
        kv.table,
        kv.lens,
        lse=lse,
        per_head=True,
        scale=scoring.scale,
        softcap=scoring.softcap,
    )


def _over_past(q: Tensor, kv: LayerKV, past: Past) -> Tensor:
    """The same of the tokens of a past, for a batch of one: its heads become the sequences of a batch."""
    scoring, tiles = kv.scoring, past.pool.tiles
    before = attend_past(q, tiles, past.tiles[kv.index], past.lens[kv.index], past.longest, scoring)
    lse = torch.logaddexp(before.lse, kv.exact(q).lse)
    if scoring.sinks is not None:
        lse = torch.logaddexp(lse, scoring.sinks.float()[None, :, None])
    _, heads, new, size = q.shape
    shape = (past.tiles.shape[1], -1, new)
    mass = attention_mass(
        q.reshape(*shape, size),
        tiles,
        past.tiles[kv.index],
        past.lens[kv.index],
        q_pos=torch.full((shape[0], new), past.longest, dtype=torch.int32, device=q.device),
        lse=lse.reshape(shape),
        per_head=True,
        scale=scoring.scale,
        softcap=scoring.softcap,
    )
    return mass.reshape(1, heads, -1)


def _nothing(q: Tensor, kv: LayerKV) -> None:
    """The rows that only lead to those that are looked at."""


def _blind() -> ModelError:
    return ModelError(
        "none of the layers that are looked at sees the whole text",
        code="unsupported",
        hint="score by likelihood",
    )
