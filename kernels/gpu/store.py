"""Writes into pages, and copies between pools of one device; both move bits and compute nothing.

`write_kv` is one launch for K and V, and one for each summary. Packed pages are a layout of the CPU: they,
and copies between devices, are left to torch. Positions and pages are not looked at (`validate` does).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from agentctx.kernels.errors import Uncovered
from agentctx.kernels.gpu.configs import KINDS, Config, arch_of, pick
from agentctx.kernels.gpu.pages import served
from agentctx.kernels.gpu.summary import updatable, update
from agentctx.kernels.records import BlockSummary, KVPages

CONFIGS = (
    Config(dim=64, blocks={"BT": 32}, warps=4, stages=1),
    Config(blocks={"BT": 16}, warps=4, stages=1),
)
COPY = Config(blocks={"N": 4096}, warps=4, stages=1)


@triton.jit
def _write(
    K,
    V,
    k_pool,
    v_pool,
    table,
    start_pos,
    T,
    NB,
    HKV,
    k_stride_b,
    k_stride_h,
    k_stride_t,
    v_stride_b,
    v_stride_h,
    v_stride_t,
    kp_stride_p,
    kp_stride_h,
    vp_stride_p,
    vp_stride_h,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BT: tl.constexpr,
):
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // HKV, pair % HKV
    t, d = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, DP)
    live = t < T
    at = tl.load(start_pos + b) + t
    page = tl.load(table + b * NB + at // PAGE, mask=live, other=0).to(tl.int64)
    inside = live[:, None] & (d < D)[None, :]
    place = (at % PAGE)[:, None] * D + d[None, :]
    t = t.to(tl.int64)
    k = tl.load(
        K + b * k_stride_b + h * k_stride_h + t[:, None] * k_stride_t + d[None, :], mask=inside, other=0
    )
    v = tl.load(
        V + b * v_stride_b + h * v_stride_h + t[:, None] * v_stride_t + d[None, :], mask=inside, other=0
    )
    tl.store(k_pool + (page * kp_stride_p + h * kp_stride_h)[:, None] + place, k, mask=inside)
    tl.store(v_pool + (page * vp_stride_p + h * vp_stride_h)[:, None] + place, v, mask=inside)


@triton.jit
def _copy(
    src,
    dst,
    ids,
    inner,
    H,
    s_stride_p,
    s_stride_h,
    d_stride_p,
    d_stride_h,
    ids_stride_n,
    ids_stride,
    N: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)  # the axis of a grid that may be long
    i, h = pair // H, pair % H
    read = tl.load(ids + i * ids_stride_n).to(tl.int64)
    written = tl.load(ids + i * ids_stride_n + ids_stride).to(tl.int64)
    at = tl.program_id(1) * N + tl.arange(0, N)
    x = tl.load(src + read * s_stride_p + h * s_stride_h + at, mask=at < inner)
    tl.store(dst + written * d_stride_p + h * d_stride_h + at, x, mask=at < inner)


def write_kv(
    kv: KVPages,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    start_pos: Tensor,
    summaries: tuple[BlockSummary, ...],
) -> None:
    served(kv)
    for summary in summaries:
        updatable(kv, summary)
    batch, heads, tokens, size = k.shape
    wide = triton.next_power_of_2(size)
    row = pick(CONFIGS, arch_of(k), dim=wide, kind=KINDS[k.dtype])
    grid = (triton.cdiv(tokens, row.blocks["BT"]), batch * heads)
    table = block_table.contiguous()
    strides = (*k.stride()[:3], *v.stride()[:3], *kv.k.stride()[:2], *kv.v.stride()[:2])
    tensors = (k, v, kv.k, kv.v, table, start_pos.contiguous())
    sizes = {"PAGE": kv.page_tokens, "D": size, "DP": wide}
    _write[grid](*tensors, tokens, table.shape[1], heads, *strides, **sizes, **row.launch)
    for summary in summaries:
        update(kv, table, start_pos, tokens, summary)


def copy_pages(pairs: tuple[tuple[Tensor, Tensor], ...], ids: Tensor) -> None:
    if any(src.device != dst.device for src, dst in pairs):
        raise Uncovered("copies between devices")
    ids = ids.to(pairs[0][0].device)
    size = COPY.blocks["N"]
    for src, dst in pairs:
        heads, inner = (src.shape[1], src[0, 0].numel()) if src.dim() > 1 else (1, 1)
        strides = [s for x in (src, dst) for s in ((x.stride(0), 0) if x.dim() == 1 else x.stride()[:2])]
        grid = (len(ids) * heads, triton.cdiv(inner, size))
        _copy[grid](src, dst, ids, inner, heads, *strides, *ids.stride(), **COPY.launch)
