"""Prefill over lists of blocks: a tenth of them, and all of them."""

from __future__ import annotations

from collections.abc import Iterable

import peers
import torch
from draw import PAGE, Sequences, Shapes, draw, exact
from measure import Bench, Candidate, Record, Target
from peers import BLOCK_Q
from torch import Tensor

from agentctx.kernels import roofline
from agentctx.kernels.prefill import block_sparse_prefill
from agentctx.kernels.records import BlockSelection


def lists(data: Sequences, kv_heads: int, rows: int, density: float) -> BlockSelection:
    """For each query block and head a random share of the blocks below the diagonal."""
    device, n_blocks = data.lens.device, rows // PAGE
    below = torch.arange(rows // BLOCK_Q, device=device) * (BLOCK_Q // PAGE)
    counts = (below * density).ceil().to(torch.int32)
    slots = max(1, int(counts.max()))
    ids = torch.arange(n_blocks, device=device)
    order = torch.rand(kv_heads, len(below), n_blocks, device=device)
    order = order.masked_fill(ids >= below[:, None], 2.0).argsort(-1)[..., :slots]
    unused = torch.arange(slots, device=device) >= counts[:, None]
    blocks = order.masked_fill(unused, n_blocks).sort(-1).values
    blocks = blocks.masked_fill(unused, 0).to(torch.int32)[None]
    pages = data.tables[0][0][blocks.long()]
    return BlockSelection(pages, blocks, counts.expand(1, kv_heads, -1).contiguous())


def seen_by(chosen: BlockSelection, i: int, tokens: int) -> Tensor:
    """Which keys the rows of query block i see, `[Hkv, BLOCK_Q, N]`."""
    device = chosen.blocks.device
    listed = torch.zeros(chosen.blocks.shape[1], tokens // PAGE, dtype=torch.bool, device=device)
    for h in range(len(listed)):
        listed[h, chosen.blocks[0, h, i, : int(chosen.counts[0, h, i])].long()] = True
    listed[:, i * (BLOCK_Q // PAGE) :] = True
    keys, rows = torch.arange(tokens, device=device), i * BLOCK_Q + torch.arange(BLOCK_Q, device=device)
    return listed.repeat_interleave(PAGE, 1)[:, None] & (keys <= rows[:, None])


def run(bench: Bench, of: Shapes, density: float, *, with_flex: bool) -> Iterable[Record]:
    """`block_sparse_prefill` of 128K against causal attention to everything, or flex over the same blocks."""
    data = draw(bench, of, of.near, sets=1, rows=of.near)  # q, K and V of one set are far beyond the cache
    kv = [data.contiguous(0)]
    chosen = lists(data, of.kv_heads, of.near, density)

    def attend(i: int) -> Tensor:
        tables = (data.tables[i], data.lens)
        options = {"block_q": BLOCK_Q, "impl": "triton"}
        return block_sparse_prefill(data.q[i], data.pool, chosen, *tables, **options).out

    def check() -> tuple[Tensor, Tensor]:
        out, got, want = attend(0), [], []
        last = of.near // BLOCK_Q - 1
        for i in (0, last // 2, last):
            rows = slice(i * BLOCK_Q, (i + 1) * BLOCK_Q)
            got.append(out[:, :, rows])
            want.append(exact(data.q[0][:, :, rows], *kv[0], seen_by(chosen, i, of.near)))
        return torch.cat(got, 2), torch.cat(want, 2)

    whole = Target(6, 8) if density < 1 else Target(0.6, 0.75)
    targets = {"sdpa flash causal": whole}
    if with_flex and density < 1:
        targets = {"flex_attention blocks": Target(1.1, 1.3)}
    own = Candidate(
        {"operation": "block_sparse_prefill", "density": density, "block_q": BLOCK_Q},
        attend,
        check,
        roofline.prefill(**of.heads, rows=of.near, tokens=of.near, density=density, element=2),
        targets,
    )
    baselines = peers.blocks(bench, of, data, kv, chosen) if with_flex else peers.causal(bench, data, kv)
    return bench.compare(of.record(of.near, of.near), [own], baselines, sets=1, graph=False)
