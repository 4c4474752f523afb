"""Quantisation in C++: float32 and bfloat16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agentctx.kernels import threads
from agentctx.kernels.errors import Uncovered
from agentctx.kernels.records import KVPages

SERVED = (torch.float32, torch.bfloat16)


def quantize_pages(lib: Any, k: Tensor, v: Tensor, bits: int) -> KVPages:
    if k.dtype not in SERVED:
        raise Uncovered(f"pages of {k.dtype}")
    pages, heads, page, size = k.shape
    width, dtype = (size, torch.int8) if bits == 8 else (size // 2, torch.uint8)
    k_codes = k.new_empty((pages, heads, page, width), dtype=dtype)
    v_codes = k.new_empty((pages, heads, width, page), dtype=dtype)
    k_scale = k.new_empty((pages, heads, size), dtype=torch.bfloat16)
    v_scale = torch.empty_like(k_scale)
    team = threads.worth(2.0 * k.numel() * k.element_size(), 8.0 * k.numel())
    lib.quantize_pages(k, v, bits, k_codes, v_codes, k_scale, v_scale, team)
    return KVPages(k_codes, v_codes, page, size, f"int{bits}", k_scale, v_scale)


def dequantize_pages(lib: Any, kv: KVPages, pages: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if dtype not in SERVED:
        raise Uncovered(f"values of {dtype}")
    k = kv.k.new_empty((len(pages), kv.n_kv_heads, kv.page_tokens, kv.head_dim), dtype=dtype)
    v = torch.empty_like(k)
    team = threads.worth(2.0 * k.numel() * k.element_size(), 4.0 * k.numel())
    ids, four = pages.contiguous(), kv.format == "int4"
    lib.dequantize_pages(kv.k, kv.v, kv.k_scale, kv.v_scale, ids, four, k, v, team)
    return k, v
