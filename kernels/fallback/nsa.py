"""Native sparse attention in tensor operations; the selected and the window branch are the prefills."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from agentctx.kernels.fallback.prefill import window_prefill
from agentctx.kernels.fallback.token_prefill import token_sparse_prefill
from agentctx.kernels.records import Attention, BlockSelection, KVPages

ROWS = 128  # whose compressed scores are held at a time


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
    sizes = (cmp_block, cmp_stride, n_selected, window)
    branches = (token_sparse_prefill, window_prefill)
    return united(q, cmp, slc, win, gates, tables, sizes, q_offset, scale, branches)


def united(
    q: Tensor,
    cmp: tuple[Tensor, Tensor],
    slc: KVPages,
    win: KVPages,
    gates: Tensor,
    tables: tuple[Tensor, Tensor],
    sizes: tuple[int, int, int, int],
    q_offset: Tensor,
    scale: float,
    branches: tuple[Callable[..., Attention], Callable[..., Attention]],
) -> tuple[Tensor, BlockSelection]:
    """All of it, given the functions of the selected and of the window branch."""
    cmp_block, cmp_stride, n_selected, window = sizes
    rows = q.shape[2]
    pieces = [
        _compressed(
            q[:, :, at : at + ROWS], cmp, slc, cmp_block, cmp_stride, n_selected, q_offset + at, scale
        )
        for at in range(0, rows, ROWS)
    ] or [_compressed(q, cmp, slc, cmp_block, cmp_stride, n_selected, q_offset, scale)]
    compressed, blocks, counts = (torch.cat(parts, 2) for parts in zip(*pieces, strict=True))
    held = torch.arange(n_selected, device=q.device) < counts[..., None]
    blocks = torch.where(held, blocks, 0)
    table = tables[0][:, None, None].expand(*blocks.shape[:3], -1)
    pages = torch.where(held, table.gather(3, blocks), 0)
    selection = BlockSelection(pages.int(), blocks.int(), counts.int())
    lens = (q_offset + rows).clamp_min(0)
    options = (q_offset, scale, 0.0, torch.float32)
    out = compressed * gates[..., :1].float()
    out += branches[0](q, slc, selection, lens, *options).out * gates[..., 1:2].float()
    out += branches[1](q, win, tables[1], lens, window, 0, *options).out * gates[..., 2:].float()
    return out.to(q.dtype), selection


def _compressed(
    q: Tensor,
    cmp: tuple[Tensor, Tensor],
    slc: KVPages,
    cmp_block: int,
    cmp_stride: int,
    n_selected: int,
    q_offset: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The compressed branch of some rows, float32, and what it selects: int64 blocks and counts."""
    batch, heads, rows, size = q.shape
    kv_heads, page, n = slc.n_kv_heads, slc.page_tokens, cmp[0].shape[2]
    k, v = (x.float()[:, :, None] for x in cmp)
    grouped = q.float().reshape(batch, kv_heads, -1, rows, size)
    position = q_offset.long()[:, None] + torch.arange(rows, device=q.device)
    ends = torch.arange(n, device=q.device) * cmp_stride + cmp_block - 1
    visible = (ends <= position[..., None])[:, None, None]
    scores = (grouped @ k.transpose(-1, -2) * scale).masked_fill(~visible, -torch.inf)
    shares = torch.softmax(scores, -1).masked_fill(~visible, 0.0)  # a row without a visible block is all NaN
    out = (shares @ v).reshape(q.shape)

    n_blocks = slc.n_pages // batch
    first = torch.arange(n, device=q.device) * cmp_stride
    importance = torch.zeros(batch, kv_heads, rows, n_blocks + 1, device=q.device)
    for stride in range(cmp_block // cmp_stride):
        into = ((first + stride * cmp_stride) // page).clamp_max(n_blocks)
        importance.index_add_(3, into, shares.sum(2))
    own = (position // page)[:, None, :, None]
    block = torch.arange(n_blocks, device=q.device)
    ranked = importance[..., :n_blocks].masked_fill((block == 0) | (block >= own - 1), torch.inf)
    ranked = ranked.masked_fill(block > own, -torch.inf)
    # A stable sort of the blocks from the last to the first: ties go to the higher one.
    order = ranked.flip(-1).sort(dim=-1, descending=True, stable=True)
    held = order.values[..., :n_selected] > -torch.inf
    chosen = torch.where(held, n_blocks - 1 - order.indices[..., :n_selected], n_blocks).sort(-1).values
    chosen = torch.nn.functional.pad(chosen, (0, n_selected - chosen.shape[-1]), value=n_blocks)
    return out, chosen, held.sum(-1)
