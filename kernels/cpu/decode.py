"""Decode in C++: pages are read where they lie; a softmax step takes four of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agentctx.kernels import threads
from agentctx.kernels.cpu.tile import cover
from agentctx.kernels.errors import Uncovered
from agentctx.kernels.records import Attention, BlockSelection, KVPages

SERVED = (torch.float32, torch.bfloat16)
MOST_ROWS = 64  # query heads of a list times query tokens


def dense_decode(
    lib: Any,
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
    return _decode(
        lib,
        q,
        kv,
        block_table,
        None,
        None,
        kv.n_kv_heads,
        context_lens,
        first_pos,
        sink_tokens,
        tail,
        splits,
        scale,
        softcap,
        out_dtype,
    )


def sparse_decode(
    lib: Any,
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
    return _decode(
        lib,
        q,
        kv,
        selection.pages,
        selection.blocks,
        selection.counts,
        selection.pages.shape[1],
        context_lens,
        first_pos,
        sink_tokens,
        tail,
        splits,
        scale,
        softcap,
        out_dtype,
    )


def _decode(
    lib: Any,
    q: Tensor,
    kv: KVPages,
    pages: Tensor,
    blocks: Tensor | None,
    counts: Tensor | None,
    lists: int,
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
    if q.dtype not in SERVED or out_dtype not in SERVED:
        raise Uncovered(f"q {q.dtype}, out {out_dtype}: float32 and bfloat16 are served")
    cover(kv)
    if heads // lists * rows > MOST_ROWS:
        raise Uncovered(f"{heads // lists * rows} rows for a list: {MOST_ROWS} are served")
    tail_k, tail_v = (None, None) if tail is None else (x.contiguous() for x in tail)
    tokens = batch * lists * pages.shape[-1] * 64
    read = 2 * tokens * size * kv.k.element_size()
    out, lse = lib.decode(
        q,
        kv.k,
        kv.v,
        kv.k_scale,
        kv.v_scale,
        kv.page_valid,
        kv.format,
        size,
        pages,
        blocks,
        counts,
        context_lens,
        first_pos,
        sink_tokens,
        tail_k,
        tail_v,
        splits or 0,
        scale,
        softcap,
        out_dtype,
        threads.worth(read, 4 * tokens * size * (heads // lists) * rows),
    )
    return Attention(out, lse)
