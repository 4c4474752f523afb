"""Layout changes by torch's own permutations."""

from __future__ import annotations

from dataclasses import replace

import torch

from agentctx.kernels.records import KVPages


def pack_pages(kv: KVPages) -> KVPages:
    pages, heads, page, size = kv.k.shape
    if kv.k.dtype == torch.float32:
        k, v = kv.k.transpose(2, 3), kv.v
    else:
        k = kv.k.unflatten(3, (size // 2, 2)).permute(0, 1, 3, 2, 4)
        v = kv.v.unflatten(2, (page // 2, 2)).permute(0, 1, 2, 4, 3)
    flat = (pages, heads, page * size)
    return replace(kv, k=k.reshape(flat).contiguous(), v=v.reshape(flat).contiguous(), format="packed")


def unpack_pages(kv: KVPages) -> KVPages:
    page, size = kv.page_tokens, kv.head_dim
    if kv.k.dtype == torch.float32:
        k = kv.k.unflatten(2, (size, page)).transpose(2, 3)
        v = kv.v.unflatten(2, (page, size))
    else:
        k = kv.k.unflatten(2, (size // 2, page, 2)).permute(0, 1, 3, 2, 4).flatten(3)
        v = kv.v.unflatten(2, (page // 2, size, 2)).permute(0, 1, 2, 4, 3).flatten(2, 3)
    return replace(kv, k=k.contiguous(), v=v.contiguous(), format="paged")
