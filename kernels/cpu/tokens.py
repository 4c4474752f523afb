"""Attention to single tokens and to summary keys in C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agentctx.kernels import threads
from agentctx.kernels.errors import Uncovered
from agentctx.kernels.records import Attention, KVPages

LANES = 16


def token_decode(
    lib: Any,
    q: Tensor,
    kv: KVPages,
    tokens: Tensor,
    counts: Tensor,
    scale: float,
    softcap: float,
    out_dtype: torch.dtype,
) -> Attention:
    _covered(q, out_dtype)
    if kv.quantised:
        raise Uncovered(f"single tokens of {kv.format} pages")
    narrowed = out_dtype == torch.bfloat16
    found = lib.token_decode(
        q, kv.k, kv.v, kv.format, kv.page_tokens, tokens, counts, scale, softcap, narrowed,
        _worth(q, tokens.numel())
    )  # fmt: skip
    return Attention(*found)


def pseudo_attention(
    lib: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_weight: Tensor,
    scale: float,
    softcap: float,
    out_dtype: torch.dtype,
) -> Attention:
    _covered(q, out_dtype)
    count = _worth(q, log_weight.numel())
    found = lib.pseudo_attention(q, k, v, log_weight, scale, softcap, out_dtype == torch.bfloat16, count)
    return Attention(*found)


def _covered(q: Tensor, out_dtype: torch.dtype) -> None:
    if not q.is_cpu:
        raise Uncovered(f"tensors on {q.device}")
    if torch.float16 in (q.dtype, out_dtype):
        raise Uncovered("float16")
    if not q.shape[3] or q.shape[3] % LANES:
        raise Uncovered(f"head size {q.shape[3]}, not a multiple of {LANES}")


def _worth(q: Tensor, slots: int) -> int:
    """Threads for `slots` keys in all, each met by the rows of its group."""
    _, heads, rows, size = q.shape
    return threads.worth(2 * slots * size * q.element_size(), 4 * slots * size * rows * heads)
