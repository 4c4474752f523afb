"""Summaries by reductions over gathered pages, some blocks at a time."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from agentctx.kernels.fallback.hadamard import hadamard
from agentctx.kernels.fallback.quant import dequantize_pages
from agentctx.kernels.fallback.store import unpack_pages
from agentctx.kernels.records import KVPages

CHUNK = 256  # blocks gathered at once: bounds the memory, not the result


def gathered(kv: KVPages, pages: Tensor, which: str) -> Tensor:
    """Float32 keys ("k") or values ("v") `[*pages.shape, Hkv, page, D]` of physical pages."""
    ids = pages.flatten().long()
    if kv.quantised:
        x = dequantize_pages(kv, ids, torch.float32)[which == "v"]
    else:
        none = ids[:0]
        some = replace(kv, k=kv.k[ids if which == "k" else none], v=kv.v[ids if which == "v" else none])
        some = unpack_pages(some) if kv.format == "packed" else some
        x = (some.v if which == "v" else some.k).float()
    return x.view(*pages.shape, *x.shape[1:])


def held_tokens(kv: KVPages, table: Tensor, lens: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Pages `[B, n]` of the columns of a table that starts at block `first`, and the tokens each holds.

    Columns past the context may name anything; they come out as page 0 with no token.
    """
    starts = torch.arange(first, first + table.shape[1], device=table.device) * kv.page_tokens
    held = (lens[:, None] - starts).clamp(0, kv.page_tokens)
    pages = torch.where(held > 0, table, 0)
    if kv.page_valid is not None:
        marked = kv.page_valid[pages.long()]
        held = torch.where((marked >= 0) & (held > 0), marked, held)
    return pages, held


def build_summary(
    kv: KVPages,
    block_table: Tensor,
    context_lens: Tensor,
    kind: str,
    first_block: int,
    data: Tensor,
    thresholds: Tensor | None,
) -> Tensor | None:
    blocks = block_table.shape[1]
    if kind == "hadamard2" and thresholds is None:
        thresholds = spread(kv, block_table, context_lens, first_block)
    for start in range(first_block, blocks, CHUNK):
        end = min(start + CHUNK, blocks)
        # one column more: sub-block means reach into the next block
        pages, held = held_tokens(kv, block_table[:, start : end + 1], context_lens, start)
        x = gathered(kv, pages, "v" if kind == "vmax" else "k").transpose(1, 2)  # [B, Hkv, n, page, D]
        live = (torch.arange(kv.page_tokens, device=x.device) < held[..., None])[:, None, ..., None]
        n = end - start
        if kind == "submeans":
            _submeans(x, live, n, data[:, :, start * kv.page_tokens // 16 : end * kv.page_tokens // 16])
            continue
        x, live = x[:, :, :n], live[:, :, :n]
        any_live = live.any(3)
        if kind == "minmax":
            high = x.masked_fill(~live, float("-inf")).amax(3)
            low = x.masked_fill(~live, float("inf")).amin(3)
            if data.dim() == 4:
                part, found = data[..., start:end], torch.cat([high, low], -1).transpose(2, 3)
                _put(part, found, any_live.transpose(2, 3))
            else:
                _put(data[:, :, start:end], torch.stack([high, low], 3), any_live[..., None])
        elif kind == "mean":
            total = x.masked_fill(~live, 0).sum(3)
            _put(data[:, :, start:end], total / live.sum(3).clamp_min(1), any_live)
        elif kind == "vmax":
            norms = x.masked_fill(~live, 0).norm(dim=-1)
            _put(data[..., start:end], norms.amax(3), any_live[..., 0])
        else:
            assert thresholds is not None
            codes = _codes(x, thresholds).masked_fill(~live, 0)
            part = data[:, :, start * kv.page_tokens : end * kv.page_tokens]
            part = torch.unflatten(part, 2, (n, kv.page_tokens))
            _put(part, codes, any_live[..., None])
    return thresholds


def _put(part: Tensor, found: Tensor, known: Tensor) -> None:
    """Write what is known, leave the rest."""
    part.copy_(torch.where(known, found.to(part.dtype), part))


def _submeans(x: Tensor, live: Tensor, n: int, part: Tensor) -> None:
    groups = torch.unflatten(x.masked_fill(~live, 0), 3, (-1, 16)).sum(4).flatten(2, 3)
    counts = torch.unflatten(live, 3, (-1, 16)).sum(4).flatten(2, 3)
    pad = (0, 0, 0, 1)
    pairs = groups + torch.nn.functional.pad(groups, pad)[:, :, 1:]
    seen = counts + torch.nn.functional.pad(counts, pad)[:, :, 1:]
    windows = part.shape[2]
    _put(part, (pairs / seen.clamp_min(1))[:, :, :windows], (seen > 0)[:, :, :windows])


def _codes(x: Tensor, thresholds: Tensor) -> Tensor:
    """2-bit codes `[..., D / 4]` of keys `[B, Hkv, n, page, D]`."""
    rotated, t = hadamard(x), thresholds.view(1, -1, 1, 1, 1)
    codes = (rotated > -t).to(torch.uint8) + (rotated > 0).to(torch.uint8) + (rotated > t).to(torch.uint8)
    a, b, c, d = codes.chunk(4, -1)
    return a | (b << 2) | (c << 4) | (d << 6)


def spread(kv: KVPages, table: Tensor, lens: Tensor, first: int) -> Tensor:
    """0.98 of the standard deviation of the rotated keys of each head, from sums over the keys as they are.

    A rotation keeps the sum of squares, and the rotated channels of a key x sum to sqrt(D) x[0].
    """
    count = torch.zeros((), dtype=torch.float64, device=table.device)
    squares = torch.zeros(kv.n_kv_heads, dtype=torch.float64, device=table.device)
    sums = torch.zeros_like(squares)
    for start in range(first, table.shape[1], CHUNK):
        pages, held = held_tokens(kv, table[:, start : start + CHUNK], lens, start)
        x = gathered(kv, pages, "k").double()  # [B, n, Hkv, page, D]
        live = torch.arange(kv.page_tokens, device=x.device) < held[..., None]
        x = x.masked_fill(~live[:, :, None, :, None], 0)
        count += live.sum()
        squares += x.square().sum((0, 1, 3, 4))
        sums += x[..., 0].sum((0, 1, 3))
    elements = count.clamp_min(1) * kv.head_dim
    mean = sums * kv.head_dim**0.5 / elements
    variance: Tensor = (squares / elements - mean.square()).clamp_min(0)
    return (0.98 * variance.sqrt()).float()
