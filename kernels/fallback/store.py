"""Writes, layout changes and copies by torch's own indexing and permutations."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from agentctx.kernels.records import BlockSummary, KVPages

STEP, SPAN = 16, 32  # submeans: means of 32 keys every 16


def write_kv(
    kv: KVPages,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    start_pos: Tensor,
    summaries: tuple[BlockSummary, ...],
) -> None:
    tokens, page = k.shape[2], kv.page_tokens
    at = start_pos.long()[:, None] + torch.arange(tokens, device=k.device)
    if k.device.type == "cpu":
        _refuse(kv, block_table, start_pos, tokens, summaries)
    where = block_table.long().gather(1, at // page), at % page
    k_rows, v_rows = k.transpose(1, 2), v.transpose(1, 2)  # [B, T, H, D]
    pages, slots = where
    if kv.format == "paged":
        kv.k[pages, :, slots] = k_rows
        kv.v[pages, :, slots] = v_rows
    elif kv.k.dtype == torch.float32:
        _k_view(kv)[pages, :, :, slots] = k_rows
        _v_view(kv)[pages, :, slots] = v_rows
    else:
        _k_view(kv)[pages, :, :, slots] = k_rows.reshape(*k_rows.shape[:3], -1, 2)
        _v_view(kv)[pages, :, slots // 2, :, slots % 2] = v_rows
    for summary in summaries:
        _update(kv, summary, block_table, at[:, 0] // page, at[:, -1] + 1, tokens)


def _refuse(
    kv: KVPages, table: Tensor, start: Tensor, tokens: int, summaries: tuple[BlockSummary, ...]
) -> None:
    """Raise IndexError for a position or page that does not exist."""
    page, blocks = kv.page_tokens, table.shape[1]
    room = min([blocks, *(_room(summary) for summary in summaries)])
    back = int(any(summary.kind == "submeans" for summary in summaries))
    for b, begin in enumerate(start.tolist()):
        last = (begin + tokens - 1) // page
        if begin < 0 or last >= room:
            raise IndexError(f"start_pos[{b}] is {begin}: {tokens} tokens from there need {last + 1} blocks")
        first = max(0, begin // page - back)
        for i, listed in enumerate(table[b, first : last + 1].tolist(), first):
            if not 0 <= listed < kv.n_pages:
                raise IndexError(f"block_table[{b}, {i}] is {listed}: the pool has {kv.n_pages} pages")


def _room(summary: BlockSummary) -> int:
    """The blocks that a summary has room for."""
    if summary.kind == "minmax" and summary.data.dim() == 4:
        return summary.data.shape[3]
    return summary.data.shape[2] // (summary.page_tokens // STEP if summary.kind == "submeans" else 1)


def _k_view(kv: KVPages) -> Tensor:
    """Packed K as `[P, H, D, 64]` or, in bfloat16, `[P, H, D/2, 64, 2]`."""
    pair = 1 if kv.k.dtype == torch.float32 else 2
    lead, shape = kv.k.shape[:2], (kv.head_dim // pair, kv.page_tokens)
    return kv.k.view(*lead, *shape) if pair == 1 else kv.k.view(*lead, *shape, 2)


def _v_view(kv: KVPages) -> Tensor:
    """Packed V as `[P, H, 64, D]` or, in bfloat16, `[P, H, 32, D, 2]`."""
    lead, page, size = kv.v.shape[:2], kv.page_tokens, kv.head_dim
    return (
        kv.v.view(*lead, page, size) if kv.v.dtype == torch.float32 else kv.v.view(*lead, page // 2, size, 2)
    )


def _keys(kv: KVPages, pages: Tensor, slots: Tensor) -> Tensor:
    """Keys `[*pages.shape, H, D]` in float32."""
    if kv.format == "paged":
        return kv.k[pages, :, slots].float()
    return _k_view(kv)[pages, :, :, slots].float().flatten(pages.dim() + 1)


def _values(kv: KVPages, pages: Tensor, slots: Tensor) -> Tensor:
    if kv.format == "paged":
        return kv.v[pages, :, slots].float()
    if kv.v.dtype == torch.float32:
        return _v_view(kv)[pages, :, slots]
    return _v_view(kv)[pages, :, slots // 2, :, slots % 2].float()


def _update(
    kv: KVPages, summary: BlockSummary, table: Tensor, first: Tensor, end: Tensor, tokens: int
) -> None:
    """Recompute the entries that depend on blocks from `first [B]` on; sequences hold `end [B]` tokens."""
    page, data = kv.page_tokens, summary.data
    last = (end - 1) // page
    step, span, count = page, page, (tokens - 1 + page - 1) // page + 1
    if summary.kind == "submeans":
        step, span, count = STEP, SPAN, count * page // STEP + 1
        first, last = (first * page // STEP - 1).clamp_min(0), (last + 1) * page // STEP - 1
    # Sequences touch unequal numbers of blocks: the shorter ones do their last entry again.
    entry = torch.minimum(first[:, None] + torch.arange(count, device=end.device), last[:, None])
    at = entry[..., None] * step + torch.arange(span, device=end.device)  # [B, count, span]
    live = (at < end[:, None, None])[..., None, None]
    at = torch.minimum(at, end[:, None, None] - 1)
    pages = table.long().gather(1, (at // page).flatten(1)).view_as(at)
    rows = (_values if summary.kind == "vmax" else _keys)(kv, pages, at % page)  # [B, count, span, H, D]
    batch = torch.arange(len(end), device=end.device)[:, None]
    if summary.kind == "minmax":
        most = rows.masked_fill(~live, float("-inf")).amax(2)
        least = rows.masked_fill(~live, float("inf")).amin(2)
        if data.dim() == 4:
            data[batch, :, :, entry] = torch.cat([most, least], -1)
        else:
            data[batch, :, entry] = torch.stack([most, least], -2).to(data.dtype)
    elif summary.kind == "vmax":
        data[batch, :, entry] = (rows * live).norm(dim=-1).amax(2)
    else:
        data[batch, :, entry] = ((rows * live).sum(2) / live.sum(2).clamp_min(1)).to(data.dtype)


def pack_pages(kv: KVPages) -> KVPages:
    pages, heads, page, size = kv.k.shape
    if kv.k.dtype == torch.float32:
        k, v = kv.k.transpose(2, 3), kv.v
    else:
        k = kv.k.view(pages, heads, page, size // 2, 2).permute(0, 1, 3, 2, 4)
        v = kv.v.view(pages, heads, page // 2, 2, size).permute(0, 1, 2, 4, 3)
    flat = (pages, heads, page * size)
    return replace(kv, k=k.reshape(flat).contiguous(), v=v.reshape(flat).contiguous(), format="packed")


def unpack_pages(kv: KVPages) -> KVPages:
    if kv.k.dtype == torch.float32:
        k, v = _k_view(kv).transpose(2, 3), _v_view(kv)
    else:
        k = _k_view(kv).permute(0, 1, 3, 2, 4).flatten(3)
        v = _v_view(kv).permute(0, 1, 2, 4, 3).flatten(2, 3)
    return replace(kv, k=k.contiguous(), v=v.clone(memory_format=torch.contiguous_format), format="paged")


def copy_pages(pairs: tuple[tuple[Tensor, Tensor], ...], ids: Tensor) -> None:
    for src, dst in pairs:
        read, written = ids[:, 0].to(src.device), ids[:, 1].long().to(dst.device)
        dst[written] = src.index_select(0, read).to(dst.device)
