"""Prefill in torch. For each query block some blocks are visible as a whole to all of its rows, the others in
part. The keys of up to 8 query blocks are gathered at a time: the whole ones go to SDPA without a mask, the
few partial ones (the diagonal, the edges of a window) with one, and the two results are united by their lse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from agentctx.kernels.fallback.gather import gather_pages
from agentctx.kernels.fallback.rows import attend_rows, merge
from agentctx.kernels.records import Attention, BlockSelection, KVPages

BLOCK_Q = 128
QUERY_BLOCKS = 8  # gathered at a time
NONE = 2**40

Rule = Callable[[Tensor, Tensor], Tensor]  # positions of rows and of keys -> seen


def dense_prefill(
    q: Tensor,
    kv: KVPages,
    block_table: Tensor,
    context_lens: Tensor,
    q_offset: Tensor,
    scale: float,
    softcap: float,
    out_dtype: torch.dtype,
) -> Attention:
    return window_prefill(q, kv, block_table, context_lens, NONE, 0, q_offset, scale, softcap, out_dtype)


def window_prefill(
    q: Tensor,
    kv: KVPages,
    block_table: Tensor,
    context_lens: Tensor,
    window: int,
    sink_tokens: int,
    q_offset: Tensor,
    scale: float,
    softcap: float,
    out_dtype: torch.dtype,
) -> Attention:
    page, block_q = kv.page_tokens, min(BLOCK_Q, max(1, q.shape[2]))
    starts = _starts(q, q_offset, block_q)[..., None]
    lens = context_lens.long()[:, None, None]
    first = ((starts - window + 1) // page).clamp_min(0)
    last = (torch.minimum(starts + block_q, lens) - 1) // page
    n_sinks = -(-min(sink_tokens, block_table.shape[1] * page) // page)
    n_near = max(0, int((last - first).max()) + 1) if last.numel() else 0
    sinks = torch.arange(n_sinks, device=q.device).expand(*starts.shape[:2], -1)
    near = first + torch.arange(n_near, device=q.device)
    blocks = torch.cat([torch.where(sinks < first, sinks, NONE), near], -1)
    blocks = torch.where(blocks <= last, blocks, NONE)
    end = (blocks + 1) * page
    inside = (blocks * page > starts + block_q - 1 - window) | (end <= sink_tokens)
    whole = (end <= starts) & (end <= lens) & inside

    def rule(position: Tensor, key: Tensor) -> Tensor:
        return (position - key < window) | (key < sink_tokens)

    full, counts = _compact(blocks, whole)
    part, _ = _compact(blocks, ~whole & (blocks < NONE))
    table = block_table.long()[:, None].expand(-1, full.shape[1], -1)
    pages = table.gather(2, torch.where(full < NONE, full, 0))
    lists = [x[:, None].expand(-1, kv.n_kv_heads, *x.shape[1:]) for x in (pages, full, counts)]
    return _attend(
        q, kv, BlockSelection(*lists), part, block_table, context_lens, starts[..., 0], block_q, rule,
        scale, softcap, out_dtype,
    )  # fmt: skip


def block_sparse_prefill(
    q: Tensor,
    kv: KVPages,
    selection: BlockSelection,
    block_table: Tensor,
    context_lens: Tensor,
    q_offset: Tensor,
    block_q: int,
    scale: float,
    softcap: float,
    out_dtype: torch.dtype,
) -> Attention:
    starts = _starts(q, q_offset, block_q)
    first = (starts // kv.page_tokens).clamp_min(0)[..., None]
    last = (torch.minimum(starts + block_q, context_lens.long()[:, None])[..., None] - 1) // kv.page_tokens
    n_diagonal = max(0, int((last - first).max()) + 1) if last.numel() else 0
    diagonal = first + torch.arange(n_diagonal, device=q.device)
    part, _ = _compact(diagonal, diagonal <= last)
    return _attend(
        q, kv, selection, part, block_table, context_lens, starts, block_q, None, scale, softcap, out_dtype
    )


def _starts(q: Tensor, q_offset: Tensor, block_q: int) -> Tensor:
    """The position of the first row of each query block, `[B, M]`."""
    return q_offset.long()[:, None] + torch.arange(0, q.shape[2], block_q, device=q.device)


def _compact(blocks: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The wanted ones of `blocks [B, M, K]` first, unused slots NONE, and how many they are."""
    counts = wanted.sum(-1)
    slots = int(counts.max()) if counts.numel() else 0
    kept = torch.where(wanted, blocks, NONE).sort(-1).values[..., :slots]
    return kept, counts


def _attend(
    q: Tensor,
    kv: KVPages,
    full: BlockSelection,
    part: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    starts: Tensor,
    block_q: int,
    rule: Rule | None,
    scale: float,
    softcap: float,
    out_dtype: torch.dtype,
) -> Attention:
    """Unite each query block's attention to its `full` lists and to the blocks `part [B, M, E]`."""
    batch, heads, rows, size = q.shape
    lists, query_blocks = full.counts.shape[1:]
    group, page = heads // lists, kv.page_tokens
    if not query_blocks:
        return Attention(q.to(out_dtype), q.new_empty(q.shape[:3], dtype=torch.float32))
    dtype = torch.float32 if kv.quantised else q.dtype
    padded = torch.nn.functional.pad(q.to(dtype), (0, 0, 0, query_blocks * block_q - rows))
    items = padded.reshape(batch, lists, group, query_blocks, block_q, size).transpose(2, 3)
    items = items.reshape(-1, group * block_q, size)
    out = torch.zeros(items.shape, dtype=out_dtype, device=q.device)
    lse = torch.full(items.shape[:2], -torch.inf, device=q.device)
    pages, blocks = (x.reshape(len(items), -1) for x in (full.pages, full.blocks))
    clipped = bool((starts // page * page > context_lens[:, None]).any())
    slots = torch.arange(page, device=q.device)

    def keys(pages: Tensor, kv_heads: Tensor) -> tuple[Tensor, Tensor]:
        k, v = gather_pages(kv, pages.flatten(), kv_heads[:, None].expand(pages.shape).flatten(), dtype)
        return k.reshape(len(pages), -1, size).contiguous(), v.reshape(len(pages), -1, size).contiguous()

    def by_validity(seen: Tensor, pages: Tensor, listed: bool) -> Tensor:
        """`seen [n, R, pages, page]`, with the rule for pages that are not in position order."""
        if kv.page_valid is not None:
            valid = kv.page_valid[pages][:, None, :, None]
            reached = (slots < valid) if listed else seen.any(-1, keepdim=True) & (slots < valid)
            seen = torch.where(valid >= 0, reached, seen)
        return seen.flatten(2)

    for count, ids in _equal_counts(full.counts):
        at = torch.tensor(ids, device=q.device)
        b, head, i = at // (lists * query_blocks), at // query_blocks % lists, at % query_blocks
        kv_heads = head // (lists // kv.n_kv_heads)
        length = context_lens.long()[b, None, None, None]
        rows_q, found = items[at], None
        if count > 0:
            listed = pages[at, :count].long()
            seen = None
            if clipped or kv.page_valid is not None:
                key = blocks[at, :count].long()[:, None, :, None] * page + slots
                seen = by_validity(key < length, listed, True)
            found = attend_rows(rows_q, *keys(listed, kv_heads), seen, scale, softcap)
        if part.shape[2]:
            these = part[b, i]
            used = these < NONE
            physical = torch.where(used, block_table[b[:, None], torch.where(used, these, 0)].long(), 0)
            position = (starts[b, i, None] + torch.arange(block_q, device=q.device))[..., None, None]
            key = these[:, None, :, None] * page + slots
            seen = (key <= position) & (key < length)
            if rule:
                seen &= rule(position, key)
            seen = by_validity(seen, physical, False).repeat(1, group, 1)
            near = attend_rows(rows_q, *keys(physical, kv_heads), seen, scale, softcap)
            found = merge(found, near) if found else near
        if found:
            out[at], lse[at] = found[0].to(out_dtype), found[1]
    out = out.view(batch, lists, query_blocks, group, block_q, size).transpose(2, 3)
    lse = lse.view(batch, lists, query_blocks, group, block_q).transpose(2, 3)
    return Attention(
        out.reshape(batch, heads, -1, size)[:, :, :rows], lse.reshape(batch, heads, -1)[:, :, :rows]
    )


def _equal_counts(counts: Tensor) -> Iterator[tuple[int, list[int]]]:
    """Runs of at most QUERY_BLOCKS items with one count: keys of equal number need no mask."""
    numbers = counts.flatten().tolist()
    run: list[int] = []
    for item in sorted(range(len(numbers)), key=numbers.__getitem__):
        if run and (len(run) == QUERY_BLOCKS or numbers[item] != numbers[run[0]]):
            yield numbers[run[0]], run
            run = []
        run.append(item)
    if run:
        yield numbers[run[0]], run
