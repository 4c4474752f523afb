"""Tokens into pages and pages between layouts in C++: float32 and bfloat16; copies of any dtype."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from agentctx.kernels import threads
from agentctx.kernels.errors import Uncovered
from agentctx.kernels.records import BlockSummary, KVPages

SERVED = (torch.float32, torch.bfloat16)
KINDS = {"minmax": 0, "mean": 1, "submeans": 2, "vmax": 3}  # as in store.cpp


def write_kv(
    lib: Any,
    kv: KVPages,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    start_pos: Tensor,
    summaries: tuple[BlockSummary, ...],
) -> None:
    if k.dtype not in SERVED:
        raise Uncovered(f"pages of {k.dtype}")
    if block_table.stride(1) != 1:
        raise Uncovered("a table with strides")
    moved = 4.0 * k.numel() * k.element_size()
    team = threads.worth(moved, 0.0) if moved > 1e5 else 1
    data = [summary.data for summary in summaries]
    kinds = [KINDS[summary.kind] for summary in summaries]
    packed = kv.format == "packed"
    lib.write_kv(kv.k, kv.v, packed, kv.page_tokens, k, v, block_table, start_pos, data, kinds, team)


def _repacked(lib: Any, kv: KVPages, shape: tuple[int, ...], format: str) -> KVPages:
    if kv.k.dtype not in SERVED:
        raise Uncovered(f"pages of {kv.k.dtype}")
    pages, heads = kv.k.shape[:2]
    k, v = kv.k.new_empty(pages, heads, *shape), kv.v.new_empty(pages, heads, *shape)
    team = threads.worth(4.0 * k.numel() * k.element_size(), 0.0)
    lib.repack_pages(kv.k, kv.v, k, v, format == "packed", kv.head_dim, team)
    return replace(kv, k=k, v=v, format=format)


def pack_pages(lib: Any, kv: KVPages) -> KVPages:
    return _repacked(lib, kv, (kv.page_tokens * kv.head_dim,), "packed")


def unpack_pages(lib: Any, kv: KVPages) -> KVPages:
    return _repacked(lib, kv, (kv.page_tokens, kv.head_dim), "paged")


def copy_pages(lib: Any, pairs: tuple[tuple[Tensor, Tensor], ...], ids: Tensor) -> None:
    if any(tensor.device.type != "cpu" for pair in pairs for tensor in pair):
        raise Uncovered("pages on another device")
    if any(not tensor[0, 0].is_contiguous() for pair in pairs for tensor in pair if tensor.dim() > 1):
        raise Uncovered("scales with strides")
    listed = ids.contiguous()
    for src, dst in pairs:
        if src.dim() == 1:  # page_valid: one number a page
            src, dst = src[:, None], dst[:, None]
        size = src.element_size() * src[0, 0].numel()
        team = threads.worth(2.0 * size * src.shape[1] * len(listed), 0.0)
        lib.copy_pages(src, dst, listed, size, team)
