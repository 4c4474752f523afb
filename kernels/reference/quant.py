"""Quantisation as it is defined, a channel at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels.records import KVPages

LARGEST = {8: 127.0, 4: 7.0}


def _channel(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of the values of one channel, and its scale. Division rounds to float32, then to bfloat16."""
    scale = (x.float().abs().max() / LARGEST[bits]).to(torch.bfloat16)
    if float(scale) < torch.finfo(torch.bfloat16).tiny:
        return torch.zeros_like(x, dtype=torch.int8), torch.zeros_like(scale)
    codes = (x.float() / scale.float()).round().clamp(-LARGEST[bits], LARGEST[bits])
    return codes.to(torch.int8), scale


def _tiles(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """int8 codes `[P, H, page, D]`, scales `[P, H, D]`."""
    codes = torch.zeros(x.shape, dtype=torch.int8)
    scales = torch.zeros(*x.shape[:2], x.shape[3], dtype=torch.bfloat16)
    for p in range(x.shape[0]):
        for h in range(x.shape[1]):
            for d in range(x.shape[3]):
                codes[p, h, :, d], scales[p, h, d] = _channel(x[p, h, :, d], bits)
    return codes, scales


def _bytes(codes: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return codes
    half = codes.shape[-1] // 2
    nibbles = codes.int() % 16  # two's complement in four bits
    return (nibbles[..., :half] + 16 * nibbles[..., half:]).to(torch.uint8)


def quantize_pages(k: Tensor, v: Tensor, bits: int) -> KVPages:
    k_codes, k_scale = _tiles(k, bits)
    v_codes, v_scale = _tiles(v, bits)
    stored = _bytes(k_codes, bits), _bytes(v_codes, bits).transpose(2, 3).contiguous()
    return KVPages(*stored, k.shape[2], k.shape[3], f"int{bits}", k_scale, v_scale)


def _codes(stored: Tensor, format: str) -> Tensor:
    if format == "int8":
        return stored.double()
    nibbles = torch.cat([stored % 16, stored // 16], -1).double()
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def dequantize_pages(kv: KVPages, pages: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    assert kv.k_scale is not None and kv.v_scale is not None
    shape = (len(pages), kv.n_kv_heads, kv.page_tokens, kv.head_dim)
    k, v = torch.empty(shape, dtype=torch.float64), torch.empty(shape, dtype=torch.float64)
    for i, p in enumerate(pages.tolist()):
        if not 0 <= p < kv.n_pages:
            raise IndexError(f"pages[{i}] is {p}: the pool has {kv.n_pages} pages")
        k[i] = _codes(kv.k[p], kv.format) * kv.k_scale[p].double().unsqueeze(1)
        v[i] = _codes(kv.v[p].transpose(1, 2), kv.format) * kv.v_scale[p].double().unsqueeze(1)
    return k.to(dtype), v.to(dtype)
