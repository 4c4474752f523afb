"""Decode: everything against copy bandwidth and torch, a selection against everything, 8 and 4 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from draw import PAGE, Sequences, Shapes, draw, exact
from measure import Bench, Call, Candidate, Record, Target
from torch import Tensor

from agentctx.kernels import roofline
from agentctx.kernels.decode import dense_decode, sparse_decode
from agentctx.kernels.quant import dequantize_pages, quantize_pages
from agentctx.kernels.records import BlockSelection, BlockSummary
from agentctx.kernels.selection import select_blocks
from agentctx.kernels.summary import build_summary

KINDS = ("minmax", "mean")


def everything(data: Sequences, i: int) -> Tensor:
    return dense_decode(data.q[i], data.pool, data.tables[i], data.lens, impl="triton").out


def dense(bench: Bench, of: Shapes, others: Callable[..., dict[str, Call]]) -> Iterable[Record]:
    """`dense_decode` of 128K against what `others` of `peers` gives."""
    sets = min(3, of.sets)
    data = draw(bench, of, of.near, sets=sets)
    kv = [data.contiguous(i) for i in range(sets)]
    own = Candidate(
        {"operation": "dense_decode"},
        lambda i: everything(data, i),
        lambda: (everything(data, 0), exact(data.q[0], *kv[0])),
        roofline.dense_decode(**of.heads, tokens=of.near, element=2),
        {"roofline": Target(0.8, 0.9), "best": Target(1.0, 1.2)},
    )
    return bench.compare(of.record(of.near), [own], others(bench, of, data, kv), sets=sets)


def step(
    data: Sequences, summaries: list[BlockSummary], budget: int, i: int
) -> tuple[BlockSelection, Tensor]:
    """Score, select, attend."""
    q, table = data.q[i], data.tables[i]
    chosen = select_blocks(q, summaries[i], table, data.lens, budget, impl="triton")
    return chosen, sparse_decode(q, data.pool, chosen, data.lens, impl="triton").out


def chosen_answer(data: Sequences, chosen: BlockSelection) -> Tensor:
    """Of set 0, over the chosen blocks."""
    counts, heads = chosen.counts[0], torch.arange(chosen.counts.shape[1], device=chosen.counts.device)
    if not bool((counts == chosen.pages.shape[2]).all()):
        raise ValueError(f"wrong: {counts.tolist()} blocks of {chosen.pages.shape[2]}")
    k, v = (x[chosen.pages[0].long(), heads[:, None]].flatten(1, 2)[None] for x in (data.pool.k, data.pool.v))
    return exact(data.q[0], k, v)


def sparse(bench: Bench, of: Shapes, tokens: int, target: Target) -> Iterable[Record]:
    """Score, select and attend to 4,096 of `tokens`, against everything."""
    sets = of.sets if tokens == of.near else min(3, of.sets)
    data = draw(bench, of, tokens, sets=sets)
    candidates = []
    for kind in KINDS:
        summaries = [build_summary(data.pool, table, data.lens, kind, impl="triton") for table in data.tables]

        def check(summaries: list[BlockSummary] = summaries) -> tuple[Tensor, Tensor]:
            chosen, out = step(data, summaries, of.budget, 0)
            return out, chosen_answer(data, chosen)

        read = roofline.block_scores(kind, **of.heads, blocks=tokens // PAGE, element=2)
        candidates.append(
            Candidate(
                {"operation": "select_blocks + sparse_decode", "budget": of.budget * PAGE, "summary": kind},
                lambda i, summaries=summaries: step(data, summaries, of.budget, i),
                check,
                read + roofline.sparse_decode(**of.heads, blocks=of.budget, element=2),
                {"dense_decode": target},
            )
        )
    baselines = {"dense_decode": lambda i: everything(data, i)}
    return bench.compare(of.record(tokens), candidates, baselines, sets=sets)


def quantised(bench: Bench, of: Shapes) -> Iterable[Record]:
    """`dense_decode` of 128K over int8 and int4 pages, against bfloat16 ones."""
    sets = min(3, of.sets)
    data = draw(bench, of, of.near, sets=sets)
    candidates = []
    for bits, target in ((8, Target(1.6, 1.85)), (4, Target(2.5, 3.3))):
        pool = quantize_pages(data.pool.k, data.pool.v, bits, impl="triton")
        coded = Sequences(data.q, pool, data.tables, data.lens)

        def check(coded: Sequences = coded) -> tuple[Tensor, Tensor]:
            pages = dequantize_pages(coded.pool, coded.tables[0][0], torch.float32, impl="torch")
            k, v = (x.transpose(0, 1).flatten(1, 2)[None] for x in pages)
            return everything(coded, 0), exact(coded.q[0], k, v)

        element = roofline.ELEMENT[f"int{bits}"]
        candidates.append(
            Candidate(
                {"operation": "dense_decode", "format": f"int{bits}"},
                lambda i, coded=coded: everything(coded, i),
                check,
                roofline.dense_decode(**of.heads, tokens=of.near, element=element),
                {"bfloat16": target},
            )
        )
    baselines = {"bfloat16": lambda i: everything(data, i)}
    return bench.compare(of.record(of.near), candidates, baselines, sets=sets)
