"""`attention_mass` of 32 queries over 128K, the lse of the rows given or found, against the roofline."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from draw import Sequences, Shapes, draw
from measure import Bench, Candidate, Record, Target
from torch import Tensor

from agentctx.kernels import roofline
from agentctx.kernels.decode import dense_decode
from agentctx.kernels.mass import attention_mass


def answer(data: Sequences, of: Shapes) -> Tensor:
    """In float32, one KV head after the other."""
    k, _ = data.contiguous(0)
    rows, tokens = data.q[0].shape[2], k.shape[2]
    group = of.q_heads // of.kv_heads
    device = k.device
    position = tokens - rows + torch.arange(rows, device=device)
    hidden = torch.arange(tokens, device=device) > position[:, None]
    mass = torch.zeros(1, tokens, device=device)
    for h in range(of.kv_heads):
        own = data.q[0][0, h * group : (h + 1) * group].float()
        scores = (own @ k[0, h].float().T * of.size**-0.5).masked_fill(hidden, float("-inf"))
        mass += scores.softmax(-1).sum((0, 1))
    return mass


def _lse(data: Sequences, q: Tensor, table: Tensor, t: int) -> Tensor:
    lens = data.lens - (q.shape[2] - 1 - t)
    return dense_decode(q[:, :, t : t + 1], data.pool, table, lens, impl="triton").lse


def run(bench: Bench, of: Shapes) -> Iterable[Record]:
    sets = min(3, of.sets)
    data = draw(bench, of, of.near, sets=sets, rows=of.questions)
    # A forward pass serves 64 rows of a KV head at once: the rows in parts.
    lse = [
        torch.cat(
            [_lse(data, q, table, t) for t in range(q.shape[2])],
            2,
        )
        for q, table in zip(data.q, data.tables, strict=True)
    ]

    def mass(i: int, known: bool) -> Tensor:
        given = lse[i] if known else None
        return attention_mass(data.q[i], data.pool, data.tables[i], data.lens, lse=given, impl="triton")

    candidates = [
        Candidate(
            {"operation": "attention_mass", "lse": "given" if known else "found"},
            lambda i, known=known: mass(i, known),
            lambda known=known: (mass(0, known), answer(data, of)),
            roofline.attention_mass(**of.heads, rows=of.questions, tokens=of.near, with_lse=known, element=2),
            {"roofline": Target(0.5, 0.7)},
        )
        for known in (False, True)
    ]
    return bench.compare(of.record(of.near, of.questions), candidates, {}, sets=sets)
