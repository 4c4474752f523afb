"""Attention that context tokens get from 32 question tokens; the baseline makes the whole matrix in torch."""

from __future__ import annotations

from typing import Any

import torch
from measure import Bench, Candidate, compare
from sequences import GROUP, HEADS, KV_HEADS, SIZE, Sequences, draw
from torch import Tensor

from agentctx.kernels import roofline
from agentctx.kernels.mass import attention_mass

CONTEXTS = (8192, 32768)
ROWS = 32


def mass(data: Sequences, impl: str, i: int) -> Tensor:
    pool = data.packed if impl == "cpp" else data.paged
    return attention_mass(data.q[i], pool, data.tables[i], data.lens, impl=impl)[:, : data.tokens]


def matrix(data: Sequences, i: int, dtype: torch.dtype) -> Tensor:
    """The sum over rows and heads of the softmax of every score."""
    q = data.q[i].view(1, KV_HEADS, GROUP * ROWS, SIZE).to(dtype)
    scores = (q @ data.k[i].to(dtype).mT).to(torch.promote_types(dtype, torch.float32)) * SIZE**-0.5
    last = torch.arange(ROWS).repeat(GROUP) + data.tokens - ROWS
    scores.masked_fill_(torch.arange(data.tokens) > last[:, None], float("-inf"))
    return scores.softmax(-1).sum((1, 2))


def run(bench: Bench) -> dict[str, list[dict[str, Any]]]:
    """Records of `attention_mass`."""
    found = []
    for tokens in CONTEXTS[:1] if bench.quick else CONTEXTS:
        for dtype in (torch.bfloat16, torch.float32):
            data = draw(tokens, dtype, 3, rows=ROWS)
            cost = roofline.attention_mass(**HEADS, rows=ROWS, tokens=tokens, element=float(dtype.itemsize))
            candidates = [
                Candidate(
                    impl,
                    impl,
                    ("matrix",),
                    lambda i, data=data, impl=impl: mass(data, impl, i),
                    lambda data=data, impl=impl: (mass(data, impl, 0), matrix(data, 0, torch.float64)),
                    cost,
                    {"operation": "attention_mass", "per": "token"},
                )
                for impl in ("cpp", "torch")
            ]
            calls = {"matrix": lambda i, data=data, dtype=dtype: matrix(data, i, dtype)}
            found += compare(bench, data.shape, dtype, candidates, calls, sets=3, batch=1)
    return {"attention_mass": found}
