"""One new token: everything, or the best 16 blocks of 64, found by the extremes of their keys.

Baselines: the fused attention of torch with packed heads, and the same after `torch.cat` of the new key and
value to the cache, as the stock cache of transformers does. The sparse number holds scoring and selection.
"""

from __future__ import annotations

from typing import Any

import torch
from measure import Bench, Call, Candidate, compare
from sequences import GROUP, HEADS, KV_HEADS, PAGE, SIZE, Sequences, draw, exact
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from agentctx.kernels import roofline
from agentctx.kernels.decode import dense_decode, sparse_decode
from agentctx.kernels.records import BlockSelection, BlockSummary
from agentctx.kernels.selection import select_blocks
from agentctx.kernels.summary import build_summary

CONTEXTS = (8192, 16384, 32768, 131072)
BUDGET = 16  # blocks


def sparse(
    data: Sequences, summaries: list[BlockSummary], impl: str, i: int
) -> tuple[BlockSelection, Tensor]:
    """Select and attend; C++ reads packed pages, torch plain ones."""
    q, pool = data.q[i], data.packed if impl == "cpp" else data.paged
    chosen = select_blocks(q, summaries[i], data.tables[i], data.lens, BUDGET, impl=impl)
    return chosen, sparse_decode(q, pool, chosen, data.lens, impl=impl).out


def dense(data: Sequences, impl: str, i: int) -> Tensor:
    pool = data.packed if impl == "cpp" else data.paged
    return dense_decode(data.q[i], pool, data.tables[i], data.lens, impl=impl).out


def answer(data: Sequences, chosen: BlockSelection | None) -> Tensor:
    """The float64 answer of set 0, over the chosen blocks or everything."""
    heads = []
    for h in range(KV_HEADS):
        k, v = data.k[0][0, h], data.v[0][0, h]
        if chosen is not None:
            blocks = chosen.blocks[0, h, : int(chosen.counts[0, h])].long()
            k, v = k.view(-1, PAGE, SIZE)[blocks].flatten(0, 1), v.view(-1, PAGE, SIZE)[blocks].flatten(0, 1)
        heads.append(exact(data.q[0][0, h * GROUP : (h + 1) * GROUP], k, v))
    return torch.cat(heads)[None]


def stock(data: Sequences) -> tuple[Call, Call]:
    """SDPA on the finished cache, and with the concatenation that precedes it in a stock cache."""

    def attend(i: int) -> Tensor:
        packed = data.q[i].view(1, KV_HEADS, GROUP, SIZE)
        return scaled_dot_product_attention(packed, data.k[i], data.v[i])

    def after_cat(i: int) -> Tensor:
        k, v = (torch.cat([x[:, :, :-1], x[:, :, -1:]], 2) for x in (data.k[i], data.v[i]))
        return scaled_dot_product_attention(data.q[i].view(1, KV_HEADS, GROUP, SIZE), k, v)

    return attend, after_cat


def run(bench: Bench) -> dict[str, list[dict[str, Any]]]:
    """Records of `sparse_decode` and `dense_decode`."""
    found: dict[str, list[dict[str, Any]]] = {"sparse_decode": [], "dense_decode": []}
    for tokens in CONTEXTS[:2] if bench.quick else CONTEXTS:
        for dtype in (torch.bfloat16, torch.float32):
            for record in at(bench, tokens, dtype):
                found[record["options"]["operation"]].append(record)
    return found


def at(bench: Bench, tokens: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    sets = bench.sets(2 * KV_HEADS * tokens * SIZE * dtype.itemsize)
    data = draw(tokens, dtype, sets)
    summaries = [build_summary(data.paged, table, data.lens, "minmax") for table in data.tables]
    attend, after_cat = stock(data)

    def right(impl: str) -> tuple[Tensor, Tensor]:
        chosen, out = sparse(data, summaries, impl, 0)
        return out, answer(data, chosen)

    element = float(dtype.itemsize)
    whole = roofline.dense_decode(**HEADS, tokens=tokens, element=element)
    part = roofline.select_blocks(**HEADS, blocks=data.blocks, element=4)
    part += roofline.sparse_decode(**HEADS, blocks=BUDGET, element=element)
    candidates = []
    for impl in ("cpp", "torch"):
        how = {"operation": "sparse_decode", "budget": BUDGET * PAGE, "summary": "minmax"}
        candidates.append(
            Candidate(
                f"sparse {impl}",
                impl,
                ("sdpa", "sdpa+cat"),
                lambda i, impl=impl: sparse(data, summaries, impl, i),
                lambda impl=impl: right(impl),
                part,
                how,
            )
        )
        candidates.append(
            Candidate(
                f"dense {impl}",
                impl,
                ("sdpa",),
                lambda i, impl=impl: dense(data, impl, i),
                lambda impl=impl: (dense(data, impl, 0), answer(data, None)),
                whole,
                {"operation": "dense_decode"},
            )
        )
    calls = {"sdpa": attend, "sdpa+cat": after_cat}
    return compare(bench, data.shape, dtype, candidates, calls, sets=sets, batch=sets)
