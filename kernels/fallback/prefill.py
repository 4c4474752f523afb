"""Prefill in torch. For each query block some blocks are visible as a whole to all of its rows, the others in
part. The keys of up to 8 query blocks are gathered at a time: the whole ones go to SDPA without a mask, the
few partial ones (the diagonal, the edges of a window) with one, and the two results are united by their lse.
"""

from __future__ import annotations

import functools
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
    visible = kv.page_valid is None and not bool((starts // page * page > context_lens[:, None]).any())
    for count, ids in _equal_counts(full.counts):
        at = torch.tensor(ids, device=q.device)
        b, head, i = at // (lists * query_blocks), at // query_blocks % lists, at % query_blocks
        length = context_lens.long()[b, None, None, None]
        parts: list[tuple[Tensor, Tensor | None]] = []
        if count > 0:
            listed = pages[at, :count].long()
            parts.append((listed, None if visible else _seen(kv, listed, blocks[at, :count].long(), length)))
        if part.shape[2]:
            near = part[b, i]
            used = near < NONE
            these = torch.where(used, block_table[b[:, None], torch.where(used, near, 0)].long(), 0)
            position = starts[b, i, None] + torch.arange(block_q, device=q.device)
            parts.append((these, _seen(kv, these, near, length, position, rule).repeat(1, group, 1)))
        kv_heads = head // (lists // kv.n_kv_heads)
        found = [
            attend_rows(items[at], *_keys(kv, some, kv_heads, dtype), seen, scale, softcap)
            for some, seen in parts
        ]
        if found:
            result, lse[at] = functools.reduce(merge, found)
            out[at] = result.to(out_dtype)
    shape = (batch, lists, query_blocks, group, block_q)

    def in_order(x: Tensor) -> Tensor:
        return x.view(*shape, -1).transpose(2, 3).reshape(batch, heads, -1, x.shape[-1])[:, :, :rows]

    return Attention(in_order(out), in_order(lse[..., None])[..., 0])


def _keys(kv: KVPages, pages: Tensor, heads: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """K and V `[n, E page, D]` of the pages `[n, E]` of one KV head for each n."""
    k, v = gather_pages(kv, pages.flatten(), heads.repeat_interleave(pages.shape[1]), dtype)
    shape = (len(pages), -1, kv.head_dim)
    return k.reshape(shape).contiguous(), v.reshape(shape).contiguous()


def _seen(
    kv: KVPages,
    pages: Tensor,
    blocks: Tensor,
    length: Tensor,
    position: Tensor | None = None,
    rule: Rule | None = None,
) -> Tensor:
    """What the rows at `position [n, R]` see of the pages `[n, E]`, `[n, R or 1, E page]`.

    Without positions all of a page is seen: it is listed. A page that is not in position order shows its
    valid tokens to the rows that reach any of it.
    """
    slots = torch.arange(kv.page_tokens, device=pages.device)
    key = blocks[:, None, :, None] * kv.page_tokens + slots
    seen = key < length
    if position is not None:
        position = position[..., None, None]
        seen = seen & (key <= position)
        if rule:
            seen &= rule(position, key)
    if kv.page_valid is not None:
        valid = kv.page_valid[pages][:, None, :, None]
        reached = seen.any(-1, keepdim=True) | (position is None)
        seen = torch.where(valid >= 0, reached & (slots < valid), seen)
    return seen.flatten(2)


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
