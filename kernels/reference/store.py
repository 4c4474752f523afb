"""Layouts as they are defined: where each element of each token lies. Summaries in float64."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from agentctx.kernels.records import BlockSummary, KVPages


def _places(kv: KVPages, slot: int) -> tuple[Tensor, Tensor]:
    """Where the D elements of a token of K and of V lie in the page of a head."""
    d = torch.arange(kv.head_dim)
    if kv.format == "paged":
        return slot * kv.head_dim + d, slot * kv.head_dim + d
    if kv.k.dtype == torch.float32:
        return d * 64 + slot, slot * kv.head_dim + d
    return d // 2 * 128 + slot * 2 + d % 2, slot // 2 * 2 * kv.head_dim + d * 2 + slot % 2


def _flat(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], -1)


def write_kv(
    kv: KVPages,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    start_pos: Tensor,
    summaries: tuple[BlockSummary, ...],
) -> None:
    page = kv.page_tokens
    for b, start in enumerate(start_pos.tolist()):
        end = start + k.shape[2]
        for position in range(start, end):
            listed = int(block_table[b, position // page])
            k_at, v_at = _places(kv, position % page)
            _flat(kv.k)[listed, :, k_at] = k[b, :, position - start]
            _flat(kv.v)[listed, :, v_at] = v[b, :, position - start]
        for summary in summaries:
            _update(kv, summary, b, block_table[b], start, end)


def _rows(kv: KVPages, table: Tensor, positions: range) -> tuple[Tensor, Tensor]:
    """K and V `[n, H, D]` in float64."""
    k, v = [], []
    for position in positions:
        listed = int(table[position // kv.page_tokens])
        k_at, v_at = _places(kv, position % kv.page_tokens)
        k.append(_flat(kv.k)[listed, :, k_at])
        v.append(_flat(kv.v)[listed, :, v_at])
    return torch.stack(k).double(), torch.stack(v).double()


def _update(kv: KVPages, summary: BlockSummary, b: int, table: Tensor, start: int, end: int) -> None:
    page, data = kv.page_tokens, summary.data
    first, last = start // page, (end - 1) // page
    if summary.kind == "submeans":
        windows = page // 16
        for i in range(max(0, windows * first - 1), windows * (last + 1)):
            held = range(16 * i, min(16 * i + 32, end))
            data[b, :, i] = _rows(kv, table, held)[0].mean(0).to(data.dtype) if len(held) else 0
        return
    for block in range(first, last + 1):
        k, v = _rows(kv, table, range(block * page, min((block + 1) * page, end)))
        if summary.kind == "mean":
            data[b, :, block] = k.mean(0).to(data.dtype)
        elif summary.kind == "vmax":
            data[b, :, block] = v.norm(dim=-1).amax(0).float()
        elif data.dim() == 4:
            data[b, :, :, block] = torch.cat([k.amax(0), k.amin(0)], -1).float()
        else:
            data[b, :, block] = torch.stack([k.amax(0), k.amin(0)], -2).to(data.dtype)


def _repacked(kv: KVPages, to: KVPages) -> KVPages:
    for listed in range(kv.n_pages):
        for slot in range(kv.page_tokens):
            for source, target, i, j in zip(
                (kv.k, kv.v), (to.k, to.v), _places(kv, slot), _places(to, slot), strict=True
            ):
                _flat(target)[listed, :, j] = _flat(source)[listed, :, i]
    return to


def pack_pages(kv: KVPages) -> KVPages:
    shape = (kv.n_pages, kv.n_kv_heads, kv.page_tokens * kv.head_dim)
    return _repacked(kv, replace(kv, k=kv.k.new_empty(shape), v=kv.v.new_empty(shape), format="packed"))


def unpack_pages(kv: KVPages) -> KVPages:
    shape = (kv.n_pages, kv.n_kv_heads, kv.page_tokens, kv.head_dim)
    return _repacked(kv, replace(kv, k=kv.k.new_empty(shape), v=kv.v.new_empty(shape), format="paged"))


def copy_pages(pairs: tuple[tuple[Tensor, Tensor], ...], ids: Tensor) -> None:
    for src, dst in pairs:
        for read, written in ids.tolist():
            dst[written] = src[read]
