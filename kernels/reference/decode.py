"""Decode attention as it is defined: for each query head the visible keys of its blocks, one softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels.records import Attention, BlockSelection, KVPages
from agentctx.kernels.reference.attend import attend
from agentctx.kernels.reference.pages import keys_of


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
    out = torch.zeros(batch, heads, rows, size, dtype=torch.float64, device=q.device)
    lse = torch.full((batch, heads, rows), -torch.inf, dtype=torch.float64, device=q.device)
    for b in range(batch):
        length = int(context_lens[b])
        first = int(first_pos[b]) if first_pos is not None else 0
        own = length - rows + torch.arange(rows, device=q.device)
        for h in range(heads):
            kv_head = h * kv.n_kv_heads // heads
            listed = h * selection.pages.shape[1] // heads
            keys, values, seen = [], [], []
            for s in range(int(selection.counts[b, listed])):
                block = int(selection.blocks[b, listed, s])
                position = block * kv.page_tokens + torch.arange(kv.page_tokens, device=q.device)
                visible = position <= own[:, None]
                visible &= (position < sink_tokens) | (position >= first)
                if tail is not None and block == length // kv.page_tokens:
                    k, v = tail[0][b, kv_head].double(), tail[1][b, kv_head].double()
                else:
                    page = int(selection.pages[b, listed, s])
                    k, v = keys_of(kv, page, kv_head)
                    if kv.page_valid is not None and int(kv.page_valid[page]) >= 0:
                        slot = torch.arange(kv.page_tokens, device=q.device)
                        visible = (slot < int(kv.page_valid[page])).expand_as(visible)
                keys.append(k)
                values.append(v)
                seen.append(visible)
            if keys:
                visible = torch.cat(seen, 1)
                found = attend(q[b, h].double(), torch.cat(keys), torch.cat(values), visible, scale, softcap)
                out[b, h], lse[b, h] = found
    return Attention(out.to(out_dtype), lse.float())
