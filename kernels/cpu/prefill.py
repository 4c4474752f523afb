"""Prefill in C++: which calls it serves, and how many threads they are worth. See src/prefill.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agentctx.kernels import threads
from agentctx.kernels.cpu.tile import cover
from agentctx.kernels.errors import Uncovered
from agentctx.kernels.records import Attention, BlockSelection, KVPages

DTYPES = (torch.float32, torch.bfloat16)


def dense_prefill(
    lib: Any,
    q: Tensor,
    kv: KVPages,
    block_table: Tensor,
    context_lens: Tensor,
    q_offset: Tensor,
    scale: float,
    softcap: float,
    out_dtype: torch.dtype,
) -> Attention:
    _cover(q, kv, out_dtype)
    keys = block_table.shape[1] * kv.page_tokens
    options = (None, 0, scale, softcap, out_dtype, _threads(q, kv, keys))
    return Attention(*lib.window_prefill(q, *_pool(kv), block_table, context_lens, q_offset, *options))


def window_prefill(
    lib: Any,
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
    _cover(q, kv, out_dtype)
    keys = min(window + sink_tokens, block_table.shape[1] * kv.page_tokens)
    options = (window, sink_tokens, scale, softcap, out_dtype, _threads(q, kv, keys))
    return Attention(*lib.window_prefill(q, *_pool(kv), block_table, context_lens, q_offset, *options))


def block_sparse_prefill(
    lib: Any,
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
    _cover(q, kv, out_dtype)
    if block_q % 16 or not 16 <= block_q <= 256:
        raise Uncovered(f"block_q {block_q}: C++ serves multiples of 16 from 16 to 256")
    keys = selection.pages.shape[-1] * kv.page_tokens + block_q
    options = (block_q, scale, softcap, out_dtype, _threads(q, kv, keys))
    tables = (*selection, block_table, context_lens, q_offset)
    return Attention(*lib.block_sparse_prefill(q, *_pool(kv), *tables, *options))


def _cover(q: Tensor, kv: KVPages, out_dtype: torch.dtype) -> None:
    if q.dtype not in DTYPES or out_dtype not in DTYPES:
        raise Uncovered(f"{q.dtype} to {out_dtype}: C++ serves float32 and bfloat16")
    cover(kv)


def _pool(kv: KVPages) -> tuple[Any, ...]:
    return kv.k, kv.v, kv.k_scale, kv.v_scale, kv.page_valid, kv.format, kv.head_dim


def _threads(q: Tensor, kv: KVPages, keys: int) -> int:
    """Threads for a call whose rows see at most `keys` keys each."""
    batch, heads, rows, size = q.shape
    read = 2.0 * batch * kv.n_kv_heads * keys * size * kv.k.element_size()
    return threads.worth(read, 4.0 * batch * heads * rows * keys * size)
