"""Attention to single tokens and to summary keys, as it is defined."""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels.records import Attention, KVPages
from agentctx.kernels.reference.attend import attend
from agentctx.kernels.reference.pages import keys_of


def token_decode(
    q: Tensor,
    kv: KVPages,
    tokens: Tensor,
    counts: Tensor,
    scale: float,
    softcap: float,
    out_dtype: torch.dtype,
) -> Attention:
    batch, heads, slots = tokens.shape
    k = torch.zeros(batch, heads, slots, kv.head_dim, dtype=torch.float64, device=q.device)
    v = torch.zeros_like(k)
    log_weight = torch.full((batch, heads, slots), -torch.inf, dtype=torch.float64, device=q.device)
    for b in range(batch):
        for h in range(heads):
            for s in range(int(counts[b, h])):
                page, slot = divmod(int(tokens[b, h, s]), kv.page_tokens)
                keys, values = keys_of(kv, page, h)
                k[b, h, s], v[b, h, s], log_weight[b, h, s] = keys[slot], values[slot], 0.0
    return pseudo_attention(q, k, v, log_weight, scale, softcap, out_dtype)


def pseudo_attention(
    q: Tensor, k: Tensor, v: Tensor, log_weight: Tensor, scale: float, softcap: float, out_dtype: torch.dtype
) -> Attention:
    batch, heads, rows, _ = q.shape
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.zeros(q.shape[:3], dtype=torch.float64, device=q.device)
    for b in range(batch):
        for h in range(heads):
            of = h * k.shape[1] // heads
            bias = log_weight[b, of].double()
            visible = (bias > -torch.inf).expand(rows, -1)
            row, keys, values = q[b, h].double(), k[b, of].double(), v[b, of].double()
            out[b, h], lse[b, h] = attend(row, keys, values, visible, scale, softcap, bias)
    return Attention(out.to(out_dtype), lse.float())
