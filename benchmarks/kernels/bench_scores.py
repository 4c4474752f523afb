"""Scores of blocks, and the whole selection of a decode step; the baseline is the torch implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from measure import Bench, Candidate, compare
from sequences import HEADS, Sequences, draw
from torch import Tensor

from agentctx.kernels import roofline
from agentctx.kernels.records import BlockSummary
from agentctx.kernels.scores import block_scores
from agentctx.kernels.selection import select_blocks
from agentctx.kernels.summary import build_summary

CONTEXTS = (8192, 32768, 131072)
BUDGET = 16


def run(bench: Bench) -> dict[str, list[dict[str, Any]]]:
    """Records of `block_scores` and `select_blocks`."""
    found: dict[str, list[dict[str, Any]]] = {"block_scores": [], "select_blocks": []}
    for tokens in CONTEXTS[:1] if bench.quick else CONTEXTS:
        data = draw(tokens, torch.bfloat16, 3)
        for kind in ("minmax", "mean", "hadamard2"):
            found["block_scores"] += scores(bench, data, kind)
        found["select_blocks"] += selection(bench, data)
    return found


def build(data: Sequences, kind: str) -> list[BlockSummary]:
    return [build_summary(data.paged, table, data.lens, kind) for table in data.tables]


def scores(bench: Bench, data: Sequences, kind: str) -> list[dict[str, Any]]:
    made = build(data, kind)
    element = 4.0 if kind == "minmax" else 2.0
    cost = roofline.block_scores(kind, **HEADS, blocks=data.blocks, element=element)

    def call(impl: str) -> Callable[[int], Tensor]:
        return lambda i: block_scores(data.q[i], made[i], data.lens, impl=impl)

    def check() -> tuple[Tensor, Tensor]:
        want = block_scores(data.q[0], made[0], data.lens, impl="reference")
        return block_scores(data.q[0], made[0], data.lens, impl="cpp")[want > -torch.inf], want[
            want > -torch.inf
        ]

    how = {"operation": "block_scores", "summary": kind}
    candidates = [Candidate("cpp", "cpp", ("torch",), call("cpp"), check, cost, how)]
    return compare(bench, data.shape, torch.bfloat16, candidates, {"torch": call("torch")}, sets=3, batch=3)


def selection(bench: Bench, data: Sequences) -> list[dict[str, Any]]:
    made = build(data, "minmax")
    cost = roofline.select_blocks(**HEADS, blocks=data.blocks, element=4)

    def chosen(impl: str, i: int) -> Tensor:
        return select_blocks(data.q[i], made[i], data.tables[i], data.lens, BUDGET, impl=impl).blocks

    how = {"operation": "select_blocks", "blocks": BUDGET}
    candidate = Candidate(
        "cpp",
        "cpp",
        ("torch",),
        lambda i: chosen("cpp", i),
        lambda: (chosen("cpp", 0), chosen("reference", 0)),
        cost,
        how,
    )
    calls = {"torch": lambda i: chosen("torch", i)}
    return compare(bench, data.shape, torch.bfloat16, [candidate], calls, sets=3, batch=3)
