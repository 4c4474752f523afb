"""Keys and values of a page, read by the layout table of `records.KVPages` element by element."""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels.records import KVPages


def keys_of(kv: KVPages, page: int, head: int) -> tuple[Tensor, Tensor]:
    """K and V of one page of one KV head, `[page_tokens, D]` float64, the unused part included.

    Raises IndexError for a page that the pool does not have.
    """
    if not 0 <= page < kv.n_pages:
        raise IndexError(f"page {page}: the pool has {kv.n_pages} pages")
    k, v = kv.k[page, head], kv.v[page, head]
    tokens, size = kv.page_tokens, kv.head_dim
    token, channel = torch.meshgrid(torch.arange(tokens), torch.arange(size), indexing="ij")
    if kv.format == "packed" and k.dtype == torch.float32:
        k = k[channel * tokens + token]
        v = v[token * size + channel]
    elif kv.format == "packed":
        k = k[(channel // 2) * 2 * tokens + 2 * token + channel % 2]
        v = v[(token // 2) * 2 * size + 2 * channel + token % 2]
    elif kv.format == "int8":
        v = v.T
    elif kv.format == "int4":
        k = _nibbles(k, channel)
        v = _nibbles(v.T, channel)
    if kv.k_scale is None or kv.v_scale is None:
        return k.double(), v.double()
    return k.double() * kv.k_scale[page, head].double(), v.double() * kv.v_scale[page, head].double()


def _nibbles(pairs: Tensor, channel: Tensor) -> Tensor:
    """The signed codes of all channels from bytes `[page_tokens, D / 2]`: i low, i + D/2 high."""
    half = pairs.shape[1]
    byte = pairs.long().gather(1, (channel % half).to(pairs.device))
    code = torch.where(channel.to(pairs.device) < half, byte & 15, byte >> 4)
    return torch.where(code >= 8, code - 16, code)
