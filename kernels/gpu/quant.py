"""Quantisation, one program for each page and head: the largest value of each channel, then the codes.

Divisions are rounded to nearest (`tl.div_rn`), and codes to even by adding 1.5 2^23, so that codes and scales
are those of the reference, bit for bit. Cost: the bytes of the values and of the codes, once each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentctx.kernels.gpu.configs import KINDS, Config, arch_of, pick
from agentctx.kernels.gpu.pages import load_tile, served
from agentctx.kernels.records import KVPages

CONFIGS = (
    Config(dim=64, blocks={}, warps=4, stages=1),
    Config(dim=128, blocks={}, warps=8, stages=1),
    Config(blocks={}, warps=16, stages=1),
)
_NEAREST = tl.constexpr(12582912.0)  # added and taken away: rounds a small float32 to even
_SMALLEST = tl.constexpr(2.0**-126)


@triton.jit
def _codes(x, LARGEST: tl.constexpr):
    # x [PAGE, N] -> int32 codes, float32 scales [N] that bfloat16 holds
    scale = tl.div_rn(tl.max(tl.abs(x), 0), tl.full([x.shape[1]], LARGEST, tl.float32))
    scale = scale.to(tl.bfloat16).to(tl.float32)
    scale = tl.where(scale < _SMALLEST, 0.0, scale)
    step = tl.where(scale > 0, scale, 1.0)
    ratio = tl.div_rn(x, tl.broadcast_to(step[None, :], x.shape))
    # a scale that was rounded down leaves ratios a little above LARGEST
    code = (ratio + _NEAREST) - _NEAREST
    code = tl.minimum(tl.maximum(code, -LARGEST), LARGEST)
    return tl.where((scale > 0)[None, :], code, 0.0).to(tl.int32), scale


@triton.jit
def _quantize(
    K,
    V,
    k_out,
    v_out,
    k_scale,
    v_scale,
    H,
    k_stride_p,
    k_stride_h,
    k_stride_t,
    v_stride_p,
    v_stride_h,
    v_stride_t,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,  # channels of a tile; two such tiles where a byte holds two
    BITS: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    page, h = pair // H, pair % H
    tokens, d = tl.arange(0, PAGE), tl.arange(0, N)
    width: tl.constexpr = D if BITS == 8 else D // 2
    inside = d < width
    for which in tl.static_range(2):
        if which == 0:
            base = K + page * k_stride_p + h * k_stride_h + tokens[:, None] * k_stride_t + d[None, :]
            scales = k_scale + pair * D + d
        else:
            base = V + page * v_stride_p + h * v_stride_h + tokens[:, None] * v_stride_t + d[None, :]
            scales = v_scale + pair * D + d
        x = tl.load(base, mask=inside[None, :], other=0).to(tl.float32)
        if BITS == 8:
            code, scale = _codes(x, 127.0)
            stored = code.to(tl.int8)
        else:
            code, scale = _codes(x, 7.0)
            x = tl.load(base + width, mask=inside[None, :], other=0).to(tl.float32)
            upper, upper_scale = _codes(x, 7.0)
            tl.store(scales + width, upper_scale.to(tl.bfloat16), mask=inside)
            stored = ((code & 15) | ((upper & 15) << 4)).to(tl.uint8)
        tl.store(scales, scale.to(tl.bfloat16), mask=inside)
        if which == 0:
            at = k_out + pair * PAGE * width + tokens[:, None] * width + d[None, :]
            tl.store(at, stored, mask=inside[None, :])
        else:
            at = v_out + pair * PAGE * width + d[:, None] * PAGE + tokens[None, :]
            tl.store(at, tl.trans(stored), mask=inside[:, None])


@triton.jit
def _dequantize(
    K,
    V,
    k_scale,
    v_scale,
    pages,
    k_out,
    v_out,
    H,
    k_stride_p,
    k_stride_h,
    v_stride_p,
    v_stride_h,
    ks_stride_p,
    ks_stride_h,
    vs_stride_p,
    vs_stride_h,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    FORMAT: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    h = pair % H
    page = tl.load(pages + pair // H).to(tl.int64)
    tokens, d = tl.arange(0, PAGE), tl.arange(0, DP)
    at = (pair * PAGE + tokens)[:, None] * D + d[None, :]
    inside = (d < D)[None, :]
    k_at, v_at = K + page * k_stride_p + h * k_stride_h, V + page * v_stride_p + h * v_stride_h
    ks, vs = k_scale + page * ks_stride_p + h * ks_stride_h, v_scale + page * vs_stride_p + h * vs_stride_h
    k = load_tile(k_at, ks, tokens, d, tokens >= 0, PAGE, D, FORMAT, False)
    tl.store(k_out + at, k.to(k_out.dtype.element_ty), mask=inside)
    v = load_tile(v_at, vs, tokens, d, tokens >= 0, PAGE, D, FORMAT, True)
    tl.store(v_out + at, v.to(v_out.dtype.element_ty), mask=inside)


def quantize_pages(k: Tensor, v: Tensor, bits: int) -> KVPages:
    pages, heads, page, size = k.shape
    width, dtype = (size, torch.int8) if bits == 8 else (size // 2, torch.uint8)
    lead, device = (pages, heads), k.device
    codes = torch.empty(*lead, page, width, dtype=dtype, device=device)
    turned = torch.empty(*lead, width, page, dtype=dtype, device=device)
    scales = [torch.empty(*lead, size, dtype=torch.bfloat16, device=device) for _ in range(2)]
    if pages:
        row = pick(CONFIGS, arch_of(k), dim=size, kind=KINDS[k.dtype])
        shape = {"PAGE": page, "D": size, "N": triton.next_power_of_2(width), "BITS": bits}
        strides = (*k.stride()[:3], *v.stride()[:3])
        _quantize[(pages * heads,)](k, v, codes, turned, *scales, heads, *strides, **shape, **row.launch)
    return KVPages(codes, turned, page, size, f"int{bits}", *scales)


def dequantize_pages(kv: KVPages, pages: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    served(kv)
    assert kv.k_scale is not None and kv.v_scale is not None
    heads, page, size = kv.n_kv_heads, kv.page_tokens, kv.head_dim
    shape = (len(pages), heads, page, size)
    k, v = (torch.empty(shape, dtype=dtype, device=kv.k.device) for _ in range(2))
    if len(pages):
        strides = [s for x in (kv.k, kv.v, kv.k_scale, kv.v_scale) for s in x.stride()[:2]]
        row = pick(CONFIGS, arch_of(kv.k), dim=size, kind=KINDS[kv.k.dtype])
        wide = triton.next_power_of_2(size)
        inputs = (kv.k, kv.v, kv.k_scale, kv.v_scale, pages.contiguous(), k, v)
        sizes = {"PAGE": page, "D": size, "DP": wide, "FORMAT": kv.format}
        _dequantize[(len(pages) * heads,)](*inputs, heads, *strides, **sizes, **row.launch)
    return k, v
