"""Masses by products with gathered keys, some blocks at a time, twice."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from agentctx.kernels.fallback.summary import gathered, held_tokens
from agentctx.kernels.records import KVPages

CHUNK = 64  # blocks whose scores exist at once


def attention_mass(
    q: Tensor,
    kv: KVPages,
    block_table: Tensor,
    context_lens: Tensor,
    q_pos: Tensor | None,
    heads: Tensor | None,
    lse: Tensor | None,
    per: str,
    per_head: bool,
    scale: float,
    softcap: float,
) -> Tensor:
    batch, n_heads, rows, _ = q.shape
    blocks, kv_heads = block_table.shape[1], kv.n_kv_heads
    group = n_heads // kv_heads
    if q_pos is None:
        q_pos = context_lens[:, None] - rows + torch.arange(rows, device=q.device)
    x = (q.float() * scale).reshape(batch, kv_heads, group * rows, q.shape[3])  # the G heads' rows together

    def scores() -> Iterator[Tensor]:
        """Scores `[B, Hkv, G, T, n, page]` of one chunk of blocks after the other, -inf where unseen."""
        for start in range(0, blocks, CHUNK):
            pages, held = held_tokens(kv, block_table[:, start : start + CHUNK], context_lens, start)
            k = gathered(kv, pages, "k").transpose(1, 2).flatten(2, 3)
            s = (x @ k.transpose(2, 3)).view(batch, kv_heads, group, rows, pages.shape[1], kv.page_tokens)
            if softcap:
                s = softcap * torch.tanh(s / softcap)
            inside = torch.arange(kv.page_tokens, device=q.device)
            at = (start + torch.arange(pages.shape[1], device=q.device))[:, None] * kv.page_tokens + inside
            causal = at <= q_pos[..., None, None]  # [B, T, n, page]
            if kv.page_valid is not None:
                causal |= (kv.page_valid[pages.long()] >= 0)[:, None, :, None]
            seen = causal & (inside < held[..., None])[:, None]
            yield s.masked_fill(~seen[:, None, None], float("-inf"))

    if lse is None:
        parts = [s.flatten(4).logsumexp(-1) for s in scores()]
        whole = torch.stack(parts).logsumexp(0) if parts else x.new_zeros(batch, kv_heads, 1, rows)
    else:
        whole = lse.reshape(batch, kv_heads, group, rows)
    weight = torch.ones(n_heads, device=q.device) if heads is None else heads
    rows_weight = weight.view(1, kv_heads, -1, 1).where(~whole.isinf(), 0)
    whole = whole.where(~whole.isinf(), 0)
    shape = (batch, n_heads, 0) if per_head else (batch, 0)
    found = [torch.zeros(shape, device=q.device)]
    for s in scores():
        part = ((s - whole[..., None, None]).exp() * rows_weight[..., None, None]).sum(3)
        part = part.flatten(1, 2) if per_head else part.sum((1, 2))
        found.append(part.flatten(-2) if per == "token" else part.sum(-1))
    return torch.cat(found, -1)


def span_sums(mass: Tensor, spans: Tensor) -> Tensor:
    before = torch.nn.functional.pad(mass.double().cumsum(1), (1, 0))
    start, end = spans.long().unbind(1)
    return (before.index_select(1, end) - before.index_select(1, start)).float()
