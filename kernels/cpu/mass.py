"""Masses in C++ (`src/mass.cpp`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agentctx.kernels import threads
from agentctx.kernels.cpu.tile import cover
from agentctx.kernels.errors import Uncovered
from agentctx.kernels.records import PACKED_TOKENS, KVPages


def attention_mass(
    lib: Any,
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
    cover(kv)
    if q.dtype == torch.float16:
        raise Uncovered("float16")
    pool = (kv.k, kv.v, kv.k_scale, kv.v_scale, kv.page_valid, kv.format, kv.head_dim)
    products = q.numel() * block_table.shape[1] * PACKED_TOKENS
    read = block_table.numel() * PACKED_TOKENS * kv.head_dim * kv.n_kv_heads * kv.k.element_size()
    many = threads.worth(2 * read, 4 * products)
    block = per == "block"
    mass: Tensor = lib.attention_mass(
        q, *pool, block_table, context_lens, q_pos, heads, lse, block, per_head, scale, softcap, many
    )
    return mass


def span_sums(lib: Any, mass: Tensor, spans: Tensor) -> Tensor:
    sums: Tensor = lib.span_sums(mass, spans)
    return sums
