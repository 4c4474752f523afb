"""Attention to single tokens and to summary keys in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels.fallback.attend import attend
from agentctx.kernels.fallback.quant import split_pairs
from agentctx.kernels.records import Attention, KVPages


def token_decode(
    q: Tensor,
    kv: KVPages,
    tokens: Tensor,
    counts: Tensor,
    scale: float,
    softcap: float,
    out_dtype: torch.dtype,
) -> Attention:
    slots = tokens.shape[2]
    live = torch.arange(slots, device=q.device) < counts[..., None]
    token = torch.where(live, tokens, 0).long()
    limit = kv.n_pages * kv.page_tokens
    if not q.is_cuda and bool((bad := live & ((token < 0) | (token >= limit))).any()):
        raise IndexError(f"tokens names token {int(token[bad][0])}: the pool has {limit} tokens")
    if limit == 0:
        live, token = live[..., :0], token[..., :0]
    head = torch.arange(kv.n_kv_heads, device=q.device)[:, None].expand(token.shape)
    k, v = _taken(kv, token // kv.page_tokens, head, token % kv.page_tokens)
    bias = torch.where(live, 0.0, -torch.inf)
    return pseudo_attention(q.to(k.dtype), k, v, bias, scale, softcap, out_dtype)


def pseudo_attention(
    q: Tensor, k: Tensor, v: Tensor, log_weight: Tensor, scale: float, softcap: float, out_dtype: torch.dtype
) -> Attention:
    batch, heads, rows, size = q.shape
    if k.shape[2] == 0:
        none = torch.full((batch, heads, rows), -torch.inf, device=q.device)
        return Attention(torch.zeros(q.shape, dtype=out_dtype, device=q.device), none)
    packed = q.reshape(batch, k.shape[1], -1, size)
    out, lse = attend(packed, k, v, log_weight.unsqueeze(2), scale, softcap)
    return Attention(out.view(q.shape).to(out_dtype), lse.view(batch, heads, rows))


def _taken(kv: KVPages, page: Tensor, head: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """K and V `[..., D]` of tokens, given by indices of one shape."""
    tokens, size = kv.page_tokens, kv.head_dim
    lead = kv.k.shape[:2]
    if kv.format == "packed" and kv.k.dtype == torch.float32:
        k, v = kv.k.view(*lead, size, tokens), kv.v.view(*lead, tokens, size)
        return k[page, head, :, slot], v[page, head, slot]
    if kv.format == "packed":
        k, v = kv.k.view(*lead, size // 2, tokens, 2), kv.v.view(*lead, tokens // 2, size, 2)
        return k[page, head, :, slot].flatten(-2), v[page, head, slot // 2, :, slot % 2]
    if kv.k_scale is None or kv.v_scale is None:
        return kv.k[page, head, slot], kv.v[page, head, slot]
    k, v = kv.k[page, head, slot], kv.v[page, head, :, slot]
    if kv.format == "int4":
        k, v = split_pairs(k), split_pairs(v)
    return k.float() * kv.k_scale[page, head].float(), v.float() * kv.v_scale[page, head].float()
