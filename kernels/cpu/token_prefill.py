"""Prefill with a list for each row, in C++: which calls it serves. See src/token_prefill.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agentctx.kernels import threads
from agentctx.kernels.cpu.tile import cover
from agentctx.kernels.errors import Uncovered
from agentctx.kernels.records import Attention, BlockSelection, KVPages

DTYPES = (torch.float32, torch.bfloat16)


def token_sparse_prefill(
    lib: Any,
    q: Tensor,
    kv: KVPages,
    selection: BlockSelection,
    context_lens: Tensor,
    q_offset: Tensor,
    scale: float,
    softcap: float,
    out_dtype: torch.dtype,
) -> Attention:
    if q.dtype not in DTYPES or out_dtype not in DTYPES:
        raise Uncovered(f"{q.dtype} to {out_dtype}: C++ serves float32 and bfloat16")
    cover(kv)
    if kv.quantised:  # widened to float32: rounding the keys once more would show in the scores
        q = q.float()
    batch, lists, rows, slots = selection.pages.shape
    keys = batch * lists * rows * slots * kv.page_tokens
    elements = 2.0 * keys * kv.head_dim
    pool = (kv.k, kv.v, kv.k_scale, kv.v_scale, kv.page_valid, kv.format, kv.head_dim)
    options = (scale, softcap, out_dtype, threads.worth(elements * q.element_size(), 2 * elements))
    return Attention(*lib.token_sparse_prefill(q, *pool, *selection, context_lens, q_offset, *options))
