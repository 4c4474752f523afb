"""Summaries in C++ (`src/summary.cpp`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agentctx.kernels import threads
from agentctx.kernels.errors import Uncovered
from agentctx.kernels.records import PACKED_TOKENS, KVPages


def build_summary(
    lib: Any,
    kv: KVPages,
    block_table: Tensor,
    context_lens: Tensor,
    kind: str,
    first_block: int,
    data: Tensor,
    thresholds: Tensor | None,
) -> Tensor | None:
    size = kv.head_dim
    if kv.page_tokens != PACKED_TOKENS:
        raise Uncovered(f"pages of {kv.page_tokens} tokens, {PACKED_TOKENS} are served")
    if kv.k.dtype == torch.float16:
        raise Uncovered("float16")
    if kind == "minmax" and data.dim() == 5:
        raise Uncovered("minmax in the layout of a GPU")
    if size % (32 if kv.format == "int4" else 16) or size > 256:
        raise Uncovered(f"head size {size} of {kv.format} pages: multiples of 16 (int4: 32) up to 256")
    pool = (kv.k, kv.v, kv.k_scale, kv.v_scale, kv.page_valid, kv.format, size)
    elements = (block_table.numel() - first_block * len(block_table)) * kv.n_kv_heads * PACKED_TOKENS * size
    many = threads.worth(elements * kv.k.element_size(), elements * (16 if kind == "hadamard2" else 4))
    if kind == "hadamard2" and thresholds is None:
        thresholds = lib.key_spread(*pool, block_table, context_lens, first_block, many).mul_(0.98)
    lib.build_summary(*pool, block_table, context_lens, kind, first_block, data, thresholds, many)
    return thresholds
