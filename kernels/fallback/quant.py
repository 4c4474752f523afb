"""Quantisation in plain tensor operations."""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels.records import KVPages

LARGEST = {8: 127.0, 4: 7.0}
SMALLEST = torch.finfo(torch.bfloat16).tiny


def _codes(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """int8 codes `[P, H, page, D]` and scales `[P, H, D]`, of values in the order (page, D)."""
    x = x.float().contiguous()  # heads may be strided, pages may not
    scale = (x.abs().amax(2) / LARGEST[bits]).to(torch.bfloat16)
    scale = torch.where(scale < SMALLEST, 0.0, scale)
    step = scale.float().unsqueeze(2)
    codes = torch.where(step > 0, x / step, 0.0).round().clamp(-LARGEST[bits], LARGEST[bits])
    return codes.to(torch.int8), scale


def _pair(codes: Tensor) -> Tensor:
    """Channels i and i + D/2 of the last dimension in one byte."""
    low, high = codes.chunk(2, -1)
    return ((low & 15) | (high << 4)).view(torch.uint8)


def split_pairs(codes: Tensor) -> Tensor:
    """int8 channels from pairs."""
    signed = codes.view(torch.int8)
    return torch.cat([(signed << 4) >> 4, signed >> 4], -1)


def quantize_pages(k: Tensor, v: Tensor, bits: int) -> KVPages:
    page, size = k.shape[2:]
    k_codes, k_scale = _codes(k, bits)
    v_codes, v_scale = _codes(v, bits)
    if bits == 4:
        k_codes, v_codes = _pair(k_codes), _pair(v_codes)
    v_codes = v_codes.transpose(2, 3).contiguous()
    return KVPages(k_codes, v_codes, page, size, f"int{bits}", k_scale, v_scale)


def dequantize_pages(kv: KVPages, pages: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    assert kv.k_scale is not None and kv.v_scale is not None
    if pages.device.type == "cpu" and bool((wrong := (pages < 0) | (pages >= kv.n_pages)).any()):
        i = int(wrong.nonzero()[0])  # a negative index would count from the end
        raise IndexError(f"pages[{i}] is {int(pages[i])}: the pool has {kv.n_pages} pages")
    k, v = kv.k[pages], kv.v[pages].transpose(2, 3).contiguous()
    if kv.format == "int4":
        k, v = split_pairs(k), split_pairs(v)
    k = k.float() * kv.k_scale[pages].float().unsqueeze(2)
    v = v.float() * kv.v_scale[pages].float().unsqueeze(2)
    return k.to(dtype), v.to(dtype)
