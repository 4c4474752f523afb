"""Random lists for prefill: one for each query block, or one for each row."""

from __future__ import annotations

import drawn
import torch
from torch import Tensor

from agentctx.kernels.records import Attention, BlockSelection


def lists_for(case: drawn.Case, offset: Tensor, block_q: int, heads: int, density: float) -> BlockSelection:
    """Random lists below the diagonal; density 1 is all of it. Per row of a list of its own: `block_q` 1."""
    batch, _, rows, _ = case.q.shape
    page, query_blocks = case.kv.page_tokens, -(-rows // block_q)
    slots = case.table.shape[1]
    pages = torch.full((batch, heads, query_blocks, slots), drawn.UNUSED, dtype=torch.int32)
    blocks, counts = pages.clone(), torch.zeros(batch, heads, query_blocks, dtype=torch.int32)
    for b in range(batch):
        for h in range(heads):
            for i in range(query_blocks):
                below = min(max(0, (int(offset[b]) + i * block_q) // page), int(case.blocks[b]))
                ids = (torch.rand(below, generator=case.generator) < density).nonzero()[:, 0]
                blocks[b, h, i, : len(ids)] = ids.int()
                pages[b, h, i, : len(ids)] = case.table[b, ids]
                counts[b, h, i] = len(ids)
    return BlockSelection(pages, blocks, counts)


def with_own_block(case: drawn.Case, offset: Tensor, heads: int, density: float) -> BlockSelection:
    """A list for each row: some blocks below its own, then its own."""
    chosen = lists_for(case, offset, 1, heads, density)
    for b, h, t in torch.ones_like(chosen.counts).nonzero().tolist():
        own, count = (int(offset[b]) + t) // case.kv.page_tokens, int(chosen.counts[b, h, t])
        if 0 <= own < int(case.blocks[b]):
            chosen.blocks[b, h, t, count] = own
            chosen.pages[b, h, t, count] = case.table[b, own]
            chosen.counts[b, h, t] += 1
    return chosen


def assert_close(impl: str, case: drawn.Case, got: Attention, want: Attention) -> None:
    """As `drawn.assert_close`; but Triton rounds quantised keys once more, to the 16 bits of the queries.

    That moves a score by up to 2**-9 of the product of the norms, with random signs by far less than half.
    """
    dtype = torch.bfloat16 if case.kv.quantised else case.q.dtype
    if impl != "triton" or not case.kv.quantised or case.q.dtype == torch.float32:
        drawn.assert_close(got, want, dtype, largest=case.largest())
        return
    seen = want.lse.isfinite()
    assert torch.equal(got.lse.isfinite(), seen) and not bool(got.out[~seen].any())
    if bool(seen.any()):
        error = case.largest() * 2**-10
        assert drawn.relative(got.out[seen], want.out[seen]) <= drawn.RELATIVE[dtype] + error
        assert float((got.lse - want.lse)[seen].abs().max()) <= 1e-3 + error
