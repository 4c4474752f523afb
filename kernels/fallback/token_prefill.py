"""Prefill with a list for each row: the lists of a few rows at a time are gathered and masked."""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels.fallback.gather import gather_pages
from agentctx.kernels.fallback.rows import attend_rows
from agentctx.kernels.records import Attention, BlockSelection, KVPages

KEYS = 65_536  # gathered at a time, about 16 MB of float32 of size 64


def token_sparse_prefill(
    q: Tensor,
    kv: KVPages,
    selection: BlockSelection,
    context_lens: Tensor,
    q_offset: Tensor,
    scale: float,
    softcap: float,
    out_dtype: torch.dtype,
) -> Attention:
    batch, heads, rows, size = q.shape
    lists, page = selection.counts.shape[1], kv.page_tokens
    dtype = torch.float32 if kv.quantised else q.dtype
    items = (
        q.to(dtype)
        .reshape(batch, lists, heads // lists, rows, size)
        .transpose(2, 3)
        .reshape(-1, heads // lists, size)
    )
    counts = selection.counts.flatten()
    out = torch.zeros(items.shape, dtype=out_dtype, device=q.device)
    lse = torch.full(items.shape[:2], -torch.inf, device=q.device)
    slots = torch.arange(page, device=q.device)
    longest = int(counts.max()) if counts.numel() else 0
    step = max(1, KEYS // (page * max(1, longest)))
    for first in range(0, len(items) if longest else 0, step):
        at = torch.arange(first, min(first + step, len(items)), device=q.device)
        b, head, row = at // (lists * rows), at // rows % lists, at % rows
        live = torch.arange(longest, device=q.device) < counts[at, None]
        pages, blocks = (
            torch.where(live, x.reshape(len(items), -1)[at, :longest], 0)
            for x in (selection.pages.long(), selection.blocks.long())
        )
        kv_heads = (head // (lists // kv.n_kv_heads))[:, None].expand(pages.shape)
        k, v = gather_pages(kv, pages.flatten(), kv_heads.flatten(), dtype)
        limit = torch.minimum(q_offset.long()[b] + row, context_lens.long()[b] - 1)
        seen = blocks[..., None] * page + slots <= limit[:, None, None]
        if kv.page_valid is not None:
            valid = kv.page_valid[pages][..., None]
            seen = torch.where(valid >= 0, slots < valid, seen)
        seen = (seen & live[..., None]).flatten(1)[:, None]
        k, v = (x.reshape(len(at), -1, size).contiguous() for x in (k, v))
        found = attend_rows(items[at], k, v, seen, scale, softcap)
        out[at], lse[at] = found[0].to(out_dtype), found[1]
    shape = (batch, lists, rows, heads // lists)
    return Attention(
        out.view(*shape, size).transpose(2, 3).reshape(batch, heads, rows, size),
        lse.view(shape).transpose(2, 3).reshape(batch, heads, rows),
    )
