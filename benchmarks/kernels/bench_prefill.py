"""A whole prompt at once: everything, or for every 128 rows the best 16 blocks by their mean key.

The baseline is the fused causal attention of torch, with `enable_gqa` or with heads expanded beforehand,
whichever is faster here. The sparse number holds pooling, scoring, selection and completion of the lists; the
summary is made when keys are written and is outside.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from measure import Bench, Call, Candidate, compare
from sequences import GROUP, HEADS, KV_HEADS, PAGE, Sequences, draw, exact
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from agentctx.kernels import roofline
from agentctx.kernels.lists import complete_lists
from agentctx.kernels.prefill import block_sparse_prefill, dense_prefill
from agentctx.kernels.records import BlockSelection, BlockSummary
from agentctx.kernels.scores import block_scores, pool_queries
from agentctx.kernels.selection import resolve_pages, topk_blocks
from agentctx.kernels.summary import build_summary

CASES = (
    (8192, torch.bfloat16, True),
    (8192, torch.float32, True),
    (16384, torch.bfloat16, True),
    (16384, torch.float32, True),
    (32768, torch.bfloat16, False),  # no dense prefill: its row has no such cell
)
BUDGET, ROWS = 16, 128
SETS = 3


def select(data: Sequences, summary: BlockSummary, impl: str, i: int) -> BlockSelection:
    """The lists of every 128 rows; the diagonal comes on top of the budget."""
    n, m = data.tokens, data.tokens // ROWS
    below = (torch.arange(m, dtype=torch.int32) * (ROWS // PAGE))[None]
    pooled = pool_queries(data.q[i], ROWS, impl=impl)
    scores = block_scores(pooled, summary, data.lens, q_pos=below * PAGE - 1, impl=impl)
    blocks, counts = topk_blocks(scores, below, BUDGET, sink_blocks=1, local_blocks=2, impl=impl)
    blocks, counts = complete_lists(
        blocks, counts, 0, n, block_q=ROWS, page_tokens=PAGE, sink_blocks=1, local_blocks=2, impl=impl
    )
    return resolve_pages(blocks, counts, data.tables[i], impl=impl)


def sparse(
    data: Sequences, summaries: list[BlockSummary], impl: str, i: int
) -> tuple[BlockSelection, Tensor]:
    pool = data.packed if impl == "cpp" else data.paged
    chosen = select(data, summaries[i], impl, i)
    found = block_sparse_prefill(
        data.q[i], pool, chosen, data.tables[i], data.lens, q_offset=0, block_q=ROWS, impl=impl
    )
    return chosen, found.out


def dense(data: Sequences, impl: str, i: int) -> Tensor:
    pool = data.packed if impl == "cpp" else data.paged
    return dense_prefill(data.q[i], pool, data.tables[i], data.lens, q_offset=0, impl=impl).out


def three_blocks(data: Sequences, out: Tensor, chosen: BlockSelection | None) -> tuple[Tensor, Tensor]:
    """The first, a middle and the last 128 rows, and their float64 answers: all heads of them."""
    got, want = [], []
    for m in (0, data.tokens // ROWS // 2, data.tokens // ROWS - 1):
        rows = slice(m * ROWS, (m + 1) * ROWS)
        position, key = torch.arange(data.tokens)[rows, None], torch.arange(data.tokens)[None]
        for h in range(KV_HEADS):
            seen = key <= position
            if chosen is not None:
                listed = torch.zeros(data.blocks, dtype=torch.bool)
                listed[chosen.blocks[0, h, m, : int(chosen.counts[0, h, m])].long()] = True
                listed[m * ROWS // PAGE :] = True
                seen = seen & listed.repeat_interleave(PAGE)
            group = slice(h * GROUP, (h + 1) * GROUP)
            want.append(exact(data.q[0][0, group, rows], data.k[0][0, h], data.v[0][0, h], seen))
            got.append(out[0, group, rows])
    return torch.cat(got), torch.cat(want)


def causal(data: Sequences) -> tuple[str, Call]:
    """The faster form of the baseline, by name."""
    wide = [
        (k.repeat_interleave(GROUP, 1), v.repeat_interleave(GROUP, 1))
        for k, v in zip(data.k, data.v, strict=True)
    ]
    attend = scaled_dot_product_attention
    forms: dict[str, Call] = {
        "sdpa causal, enable_gqa": lambda i: attend(
            data.q[i], data.k[i], data.v[i], is_causal=True, enable_gqa=True
        ),
        "sdpa causal, heads expanded": lambda i: attend(data.q[i], *wide[i], is_causal=True),
    }
    took = {}
    for name, form in forms.items():
        began = time.thread_time()
        form(0)
        took[name] = time.thread_time() - began
    best = min(took, key=lambda name: took[name])
    return best, forms[best]


def flex(data: Sequences, summaries: list[BlockSummary]) -> Callable[[int], Tensor]:
    """torch's flex_attention, compiled, over the same blocks; its first call takes half a minute."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    m, wide = data.tokens // ROWS, ROWS // PAGE

    def mask(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return key <= row

    def attend(i: int) -> Tensor:
        chosen = select(data, summaries[i], "cpp", i)
        counts = chosen.counts.repeat_interleave(GROUP, 1)
        listed = chosen.blocks.repeat_interleave(GROUP, 1)
        full = torch.zeros(1, counts.shape[1], m, data.blocks, dtype=torch.int32)
        full[..., : listed.shape[-1]] = listed
        diagonal = torch.zeros_like(full)
        diagonal[..., :wide] = (torch.arange(m)[:, None] * wide + torch.arange(wide)).int()
        block_mask = BlockMask.from_kv_blocks(
            torch.full_like(counts, wide), diagonal, counts, full, BLOCK_SIZE=(ROWS, PAGE), mask_mod=mask
        )
        found: Tensor = compiled(data.q[i], data.k[i], data.v[i], block_mask=block_mask, enable_gqa=True)
        return found

    return attend


def run(bench: Bench) -> dict[str, list[dict[str, Any]]]:
    """Records of `block_sparse_prefill` and `dense_prefill`."""
    found: dict[str, list[dict[str, Any]]] = {"block_sparse_prefill": [], "dense_prefill": []}
    for tokens, dtype, with_dense in CASES[:2] if bench.quick else CASES:
        for record in at(bench, tokens, dtype, with_dense):
            found[record["options"]["operation"]].append(record)
    return found


def at(bench: Bench, tokens: int, dtype: torch.dtype, with_dense: bool) -> list[dict[str, Any]]:
    data = draw(tokens, dtype, SETS, rows=tokens)
    summaries = [build_summary(data.paged, table, data.lens, "mean") for table in data.tables]
    name, baseline = causal(data)
    element = float(dtype.itemsize)
    whole = roofline.prefill(**HEADS, rows=tokens, tokens=tokens, element=element)
    row_blocks = tokens // ROWS
    read = sum(min(BUDGET, 2 * m) * PAGE for m in range(row_blocks)) * ROWS + row_blocks * ROWS * ROWS / 2
    density = read / (tokens * tokens / 2)
    part = roofline.block_scores(
        "mean", **HEADS, blocks=data.blocks, rows=row_blocks, element=element
    ) + roofline.prefill(**HEADS, rows=tokens, tokens=tokens, density=density, element=element)
    how = {"operation": "block_sparse_prefill", "budget": BUDGET * PAGE, "summary": "mean", "block_q": ROWS}

    def right(impl: str) -> tuple[Tensor, Tensor]:
        chosen, out = sparse(data, summaries, impl, 0)
        return three_blocks(data, out, chosen)

    candidates = [
        Candidate(
            f"sparse {impl}",
            impl,
            (name,),
            lambda i, impl=impl: sparse(data, summaries, impl, i),
            lambda impl=impl: right(impl),
            part,
            how,
        )
        for impl in ("cpp", "torch")
    ]
    if with_dense:
        candidates.append(
            Candidate(
                "dense",
                "cpp",
                (name,),
                lambda i: dense(data, "cpp", i),
                lambda: three_blocks(data, dense(data, "cpp", 0), None),
                whole,
                {"operation": "dense_prefill"},
            )
        )
    if bench.flex and tokens == CASES[0][0]:
        attend = flex(data, summaries)
        candidates.append(
            Candidate(
                "flex",
                "flex_attention, compiled",
                (name,),
                attend,
                lambda: three_blocks(data, attend(0), select(data, summaries[0], "cpp", 0)),
                part,
                how,
            )
        )
    return compare(bench, data.shape, dtype, candidates, {name: baseline}, sets=SETS, batch=1, seconds=3.0)
