"""The definition of native sparse attention: row by row, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels.records import BlockSelection, KVPages
from agentctx.kernels.reference.attend import attend
from agentctx.kernels.reference.prefill import window_prefill
from agentctx.kernels.reference.token_prefill import token_sparse_prefill


def nsa_forward(
    q: Tensor,
    cmp: tuple[Tensor, Tensor],
    slc: KVPages,
    win: KVPages,
    gates: Tensor,
    tables: tuple[Tensor, Tensor],
    cmp_block: int,
    cmp_stride: int,
    n_selected: int,
    window: int,
    q_offset: Tensor,
    scale: float,
) -> tuple[Tensor, BlockSelection]:
    batch, heads, rows, _ = q.shape
    kv_heads, page = slc.n_kv_heads, slc.page_tokens
    group = heads // kv_heads
    ends = torch.arange(cmp[0].shape[2]) * cmp_stride + cmp_block - 1
    compressed = torch.zeros(q.shape, dtype=torch.float64)
    blocks = torch.zeros(batch, kv_heads, rows, n_selected, dtype=torch.int32)
    pages, counts = torch.zeros_like(blocks), torch.zeros(blocks.shape[:3], dtype=torch.int32)
    for b in range(batch):
        for h in range(kv_heads):
            k, v = (x[b, h].double() for x in cmp)
            some = slice(h * group, (h + 1) * group)
            for t in range(rows):
                position = int(q_offset[b]) + t
                visible = (ends <= position).expand(group, -1)
                compressed[b, some, t], lse = attend(q[b, some, t].double(), k, v, visible, scale)
                shares = torch.exp(scale * (q[b, some, t].double() @ k.T) - lse[:, None]) * visible
                chosen = _select(
                    shares.nan_to_num(0).sum(0), position, page, cmp_block, cmp_stride, n_selected
                )
                blocks[b, h, t, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
                pages[b, h, t, : len(chosen)] = tables[0][b, chosen]
                counts[b, h, t] = len(chosen)
    selection = BlockSelection(pages, blocks, counts)
    lens = (q_offset + rows).clamp_min(0)
    options = (q_offset, scale, 0.0, torch.float32)
    selected = token_sparse_prefill(q, slc, selection, lens, *options).out
    near = window_prefill(q, win, tables[1], lens, window, 0, *options).out
    branches = torch.stack([compressed, selected.double(), near.double()], -1)
    return (branches * gates.double()[..., None, :]).sum(-1).to(q.dtype), selection


def _select(
    shares: Tensor, position: int, page: int, cmp_block: int, cmp_stride: int, n_selected: int
) -> list[int]:
    """The blocks of one row and KV head, ascending."""
    own = position // page
    importance = [0.0] * max(0, own + 1)
    for i, share in enumerate(shares.tolist()):
        for stride in range(i, i + cmp_block // cmp_stride):
            if stride * cmp_stride // page <= own:
                importance[stride * cmp_stride // page] += share
    forced = {block for block in (0, own - 1, own) if 0 <= block <= own}
    rest = sorted(set(range(own + 1)) - forced, key=lambda block: (importance[block], block), reverse=True)
    return sorted([*forced, *rest[: n_selected - len(forced)]])
