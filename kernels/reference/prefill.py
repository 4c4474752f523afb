"""The definition of prefill: every query block gathers the blocks that it reaches and attends in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from agentctx.kernels.records import Attention, BlockSelection, KVPages
from agentctx.kernels.reference.attend import attend
from agentctx.kernels.reference.pages import keys_of

# (sequence, head, first row) -> pages and logical ids of the blocks to read, and how many of them are listed
Blocks = Callable[[int, int, int], tuple[list[int], list[int], int]]


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
    far = 2**31
    return window_prefill(q, kv, block_table, context_lens, far, 0, q_offset, scale, softcap, out_dtype)


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
    def context(b: int, head: int, row: int) -> tuple[list[int], list[int], int]:
        used = -(-int(context_lens[b]) // kv.page_tokens)
        return block_table[b, :used].tolist(), list(range(used)), 0

    def rule(position: Tensor, key: Tensor) -> Tensor:
        return (position - key < window) | (key < sink_tokens)

    rows = max(1, q.shape[2])
    return by_query_block(q, kv, context_lens, q_offset, rows, context, scale, softcap, out_dtype, rule)


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
    heads = q.shape[1] // selection.counts.shape[1]

    def listed_and_diagonal(b: int, head: int, row: int) -> tuple[list[int], list[int], int]:
        at = (b, head // heads, row // block_q)
        count = int(selection.counts[at])
        used = -(-int(context_lens[b]) // kv.page_tokens)
        diagonal = range(max(0, (int(q_offset[b]) + row) // kv.page_tokens), used)
        pages = [*selection.pages[at][:count].tolist(), *(int(block_table[b, i]) for i in diagonal)]
        return pages, [*selection.blocks[at][:count].tolist(), *diagonal], count

    return by_query_block(
        q, kv, context_lens, q_offset, block_q, listed_and_diagonal, scale, softcap, out_dtype
    )


def by_query_block(
    q: Tensor,
    kv: KVPages,
    context_lens: Tensor,
    q_offset: Tensor,
    block_q: int,
    blocks_of: Blocks,
    scale: float,
    softcap: float,
    out_dtype: torch.dtype,
    rule: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Attention:
    """Attend from every `block_q` rows to the blocks that `blocks_of` names; `rule` may hide keys."""
    batch, heads, rows, size = q.shape
    group, page = heads // kv.n_kv_heads, kv.page_tokens
    slots = torch.arange(page)
    held = functools.cache(functools.partial(keys_of, kv))
    out = torch.zeros(batch, heads, rows, size, dtype=torch.float64)
    lse = torch.full((batch, heads, rows), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        for head in range(heads):
            for first in range(0, rows, block_q):
                pages, blocks, listed = blocks_of(b, head, first)
                if not pages:
                    continue
                some = slice(first, min(rows, first + block_q))
                position = int(q_offset[b]) + torch.arange(rows)[some, None, None]
                key = torch.tensor(blocks)[:, None] * page + slots
                seen = (key <= position) & (key < int(context_lens[b]))
                if rule:
                    seen &= rule(position, key)
                for i, one in enumerate(pages):
                    valid = -1 if kv.page_valid is None else int(kv.page_valid[one])
                    if valid >= 0:
                        reached = (
                            torch.ones(seen.shape[0], dtype=torch.bool) if i < listed else seen[:, i].any(1)
                        )
                        seen[:, i] = reached[:, None] & (slots < valid)
                parts = [held(one, head // group) for one in pages]
                k, v = (torch.cat(side) for side in zip(*parts, strict=True))
                rows_q = q[b, head, some].double()
                out[b, head, some], lse[b, head, some] = attend(rows_q, k, v, seen.flatten(1), scale, softcap)
    return Attention(out.to(out_dtype), lse.float())
