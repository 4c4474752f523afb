"""Decode attention in torch: listed pages are gathered, the query heads of a list are rows of one product.

Long lists go in pieces whose gathered keys stay near the caches, united by their lse. Masks cover a piece.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels.fallback.attend import attend
from agentctx.kernels.fallback.gather import gather_pages
from agentctx.kernels.fallback.merge import merge_lse
from agentctx.kernels.records import Attention, BlockSelection, KVPages

PIECE = 2**20  # elements of K gathered at once


def dense_decode(
    q: Tensor,
    kv: KVPages,
    block_table: Tensor,
    context_lens: Tensor,
    first_pos: Tensor | None,
    sink_tokens: int,
    tail: tuple[Tensor, Tensor] | None,
    splits: int | None,
    scale: float,
    softcap: float,
    out_dtype: torch.dtype,
) -> Attention:
    batch, slots = block_table.shape
    lists = (batch, kv.n_kv_heads, slots)
    blocks = torch.arange(slots, dtype=torch.int32, device=q.device).expand(lists)
    used = (context_lens + kv.page_tokens - 1) // kv.page_tokens
    everything = BlockSelection(block_table[:, None].expand(lists), blocks, used[:, None].expand(lists[:2]))
    options = (first_pos, sink_tokens, tail, splits, scale, softcap, out_dtype)
    return sparse_decode(q, kv, everything, context_lens, *options)


def sparse_decode(
    q: Tensor,
    kv: KVPages,
    selection: BlockSelection,
    context_lens: Tensor,
    first_pos: Tensor | None,
    sink_tokens: int,
    tail: tuple[Tensor, Tensor] | None,
    splits: int | None,
    scale: float,
    softcap: float,
    out_dtype: torch.dtype,
) -> Attention:
    batch, heads, rows, size = q.shape
    lists, slots = selection.pages.shape[1:]
    counts, least = selection.counts, 0
    if slots and counts.numel() and not q.is_cuda:  # a GPU would have to be waited for
        least, most = (max(0, int(x)) for x in torch.aminmax(counts))
        slots = min(slots, most)
    if slots == 0:
        none = torch.full((batch, heads, rows), -torch.inf, device=q.device)
        return Attention(torch.zeros(q.shape, dtype=out_dtype, device=q.device), none)
    dtype = torch.float32 if kv.quantised else q.dtype
    packed = q.to(dtype).reshape(batch, lists, heads // lists * rows, size)
    step = max(1, PIECE // (batch * lists * kv.page_tokens * size))
    parts = []
    for at in range(0, slots, step):
        here = slice(at, min(at + step, slots))
        pages, blocks, live = selection.pages[..., here], selection.blocks[..., here], None
        if here.stop > least:
            live = torch.arange(here.start, here.stop, device=q.device) < counts[..., None]
            pages, blocks = torch.where(live, pages, 0), torch.where(live, blocks, 0)
        k, v, bias = _piece(kv, pages, blocks, live, rows, dtype, context_lens, first_pos, sink_tokens, tail)
        if bias is not None and rows > 1:
            bias = bias.repeat(1, 1, heads // lists, 1)
        out, lse = attend(packed, k, v, bias, scale, softcap)
        parts.append(Attention(out.view(q.shape), lse.reshape(batch, heads, rows)))
    if len(parts) == 1:
        return Attention(parts[0].out.to(out_dtype), parts[0].lse)
    return merge_lse(parts, out_dtype)


def _piece(
    kv: KVPages,
    pages: Tensor,
    blocks: Tensor,
    live: Tensor | None,
    rows: int,
    dtype: torch.dtype,
    context_lens: Tensor,
    first_pos: Tensor | None,
    sink_tokens: int,
    tail: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """K and V `[B, L, N, D]` of the listed slots `[B, L, S]`, and what hides some of them, `[B, L, T, N]`.

    `live` tells which slots are in use, None that all are.
    """
    batch, lists, slots = pages.shape
    page = kv.page_tokens
    head = torch.arange(kv.n_kv_heads, device=pages.device).repeat_interleave(lists // kv.n_kv_heads)
    open_page = None
    if tail is not None:
        open_page = blocks == (context_lens // page)[:, None, None]
        if live is not None:
            open_page &= live
        pages = torch.where(open_page, 0, pages)
    of_slot = head[:, None].expand(batch, lists, slots)
    k, v = gather_pages(kv, pages.reshape(-1).long(), of_slot.reshape(-1), dtype)
    k, v = k.view(batch, lists, slots, page, -1), v.view(batch, lists, slots, page, -1)
    if tail is not None and open_page is not None and (pages.is_cuda or bool(open_page.any())):
        here = open_page[..., None, None]
        k = torch.where(here, tail[0][:, head].unsqueeze(2), k)
        v = torch.where(here, tail[1][:, head].unsqueeze(2), v)
    k, v = k.flatten(2, 3), v.flatten(2, 3)

    plain = live is None and first_pos is None and kv.page_valid is None
    if plain and not pages.is_cuda and (int(blocks.max()) + 1) * page <= int(context_lens.min()) - rows + 1:
        return k, v, None
    slot = torch.arange(page, device=pages.device)
    position = (blocks[..., None] * page + slot).unsqueeze(2)  # [B, L, 1, S, page]
    own = context_lens[:, None] - rows + torch.arange(rows, device=pages.device)
    seen = position <= own[:, None, :, None, None]
    if first_pos is not None:
        seen &= (position < sink_tokens) | (position >= first_pos[:, None, None, None, None])
    if kv.page_valid is not None:
        valid = kv.page_valid[pages.long()]
        if open_page is not None:
            valid = torch.where(open_page, -1, valid)
        valid = valid[:, :, None, :, None]
        seen = torch.where(valid >= 0, slot < valid, seen)
    if live is not None:
        seen &= live[:, :, None, :, None]
    return k, v, torch.where(seen, 0.0, -torch.inf).flatten(3)
