"""Keys and values in 8 or 4 bits: symmetric, one bfloat16 scale for each page, head and channel."""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels import checks, choose
from agentctx.kernels.records import KVPages


def quantize_pages(k: Tensor, v: Tensor, bits: int, *, impl: str | None = None) -> KVPages:
    """Quantise whole pages; k, v `[P, Hkv, page_tokens, D]`.

    A code is `round(x / scale)` within ±127 (8 bits) or ±7 (4 bits); a channel of zeros has scale 0 and
    codes 0. Raises ValueError for bits other than 4 and 8, or shapes and dtypes that do not fit.
    """
    checks.tensor("k", k, 4)
    checks.tensor("v", v, 4)
    checks.floats("k", k)
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}: 4 or 8 is needed")
    if k.shape != v.shape or k.dtype != v.dtype:
        raise ValueError(f"k is {k.dtype} {list(k.shape)}, v {v.dtype} {list(v.shape)}: they must be alike")
    if bits == 4 and k.shape[3] % 2:
        raise ValueError(f"k has head size {k.shape[3]}: int4 needs an even number")
    pages: KVPages = choose.run("quantize_pages", impl, k.device, k, v, bits)
    return pages


def dequantize_pages(
    kv: KVPages, pages: Tensor, dtype: torch.dtype, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """K and V `[n, Hkv, page_tokens, D]` in `dtype` of the pages listed in `pages [n]`.

    Raises ValueError for pools that are not quantised, IndexError for a page outside the pool.
    """
    checks.pages(kv)
    if not kv.quantised:
        raise ValueError(f"kv has format {kv.format}: int8 or int4 is needed")
    found: tuple[Tensor, Tensor] = choose.run("dequantize_pages", impl, kv.k.device, kv, pages, dtype)
    return found
