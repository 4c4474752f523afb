"""Pages out of a pool as rows of plain keys and values."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from agentctx.kernels.fallback.quant import dequantize_pages
from agentctx.kernels.fallback.store import unpack_pages
from agentctx.kernels.records import KVPages


def gather_pages(kv: KVPages, pages: Tensor, heads: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """K and V `[n, page_tokens, D]` in `dtype`, of page `pages[i]` and KV head `heads[i]`; both int64 `[n]`.

    On the CPU a page that the pool does not have raises IndexError; a GPU asserts by itself.
    """
    if pages.numel() and not pages.is_cuda:
        low, high = torch.aminmax(pages)
        if low < 0 or high >= kv.n_pages:
            wrong = int(low if low < 0 else high)
            raise IndexError(f"selection or table names page {wrong}: the pool has {kv.n_pages} pages")
    k, v = _rows(kv.k, pages, heads), _rows(kv.v, pages, heads)
    if kv.k_scale is not None and kv.v_scale is not None:
        scales = kv.k_scale[pages, heads].unsqueeze(1), kv.v_scale[pages, heads].unsqueeze(1)
        taken = replace(kv, k=k, v=v, k_scale=scales[0], v_scale=scales[1])
        k, v = dequantize_pages(taken, torch.arange(len(pages), device=pages.device), dtype)
    elif kv.format == "packed":
        taken = unpack_pages(replace(kv, k=k, v=v))
        k, v = taken.k, taken.v
    return k.to(dtype)[:, 0], v.to(dtype)[:, 0]


def _rows(x: Tensor, pages: Tensor, heads: Tensor) -> Tensor:
    """`x[pages, heads]` of `[P, Hkv, ...]` as `[n, 1, ...]`.

    By index_select where the strides allow it: it is faster than advanced indexing.
    """
    shape = x.shape[2:]
    width = shape.numel()
    page, head = x.stride(0), x.stride(1)
    if page % width or head % width:
        return x[pages, heads].unsqueeze(1)
    last = (x.shape[0] - 1) * page + (x.shape[1] - 1) * head
    flat = x.as_strided((last // width + 1, width), (width, 1))
    taken = flat.index_select(0, torch.add(heads * (head // width), pages, alpha=page // width))
    return taken.view(len(pages), 1, *shape)
