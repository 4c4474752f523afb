"""Summaries: one program for each block and head reads the block once and writes its entry.

The same kernel serves `build_summary`, from a given block to the end of every sequence, and `write_kv`
(`update`), for the blocks that a write has touched; there the first block and the end are read on the device.
`hadamard2` rotates on tensor cores (see `hadamard.py`); default thresholds come from sums by torch, once for
a context. Cost: the bytes of K (vmax: V) of the blocks; of `submeans` a quarter more (16 tokens of the next
block). Limits: head sizes to 256 (hadamard2: 16 to 256 in
bfloat16, else to 128), packed pages are left to torch; minmax always in the GPU layout.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentctx.kernels.errors import Uncovered
from agentctx.kernels.fallback.summary import spread
from agentctx.kernels.gpu.configs import KINDS, Config, arch_of, pick
from agentctx.kernels.gpu.hadamard import rotated
from agentctx.kernels.gpu.pages import load_tile, served
from agentctx.kernels.records import BlockSummary, KVPages

CONFIGS = (
    Config(dim=128, blocks={}, warps=4, stages=1),
    Config(blocks={}, warps=8, stages=1),
)


@triton.jit
def _page(table, lens, valid, b, block, NB, end, PAGE: tl.constexpr, HAS_VALID: tl.constexpr):
    # page of a block and the tokens it holds; page 0 and no token past the context
    left = end - block * PAGE
    page = tl.load(table + b * NB + block, mask=(left > 0) & (block < NB), other=0).to(tl.int64)
    held = tl.minimum(tl.maximum(left, 0), PAGE)
    if HAS_VALID:
        marked = tl.load(valid + page)
        held = tl.where((marked >= 0) & (left > 0), marked, held)
    return page, held


@triton.jit
def _summarise(
    X,
    scales,
    table,
    lens,  # tokens of each sequence; with STARTED those before the write
    valid,
    thresholds,
    out,
    NB,
    CAP,  # blocks that out holds
    HKV,
    first,
    added,
    x_stride_p,
    x_stride_h,
    s_stride_p,
    s_stride_h,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    FORMAT: tl.constexpr,
    KIND: tl.constexpr,
    STARTED: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // HKV, pair % HKV
    end = tl.load(lens + b) + added
    block = first + tl.program_id(0)
    if STARTED:
        block += (end - added) // PAGE
    if (block < 0) | (block * PAGE >= end) | (block >= NB) | (block >= CAP):
        return
    page, held = _page(table, lens, valid, b, block, NB, end, PAGE, HAS_VALID)
    tokens, d = tl.arange(0, PAGE), tl.arange(0, DP)
    live, inside = tokens < held, d < D
    transposed: tl.constexpr = KIND == "vmax" and FORMAT != "paged"
    base = X + page * x_stride_p + h * x_stride_h
    own = scales + page * s_stride_p + h * s_stride_h
    entry = pair * CAP + block
    # [PAGE, DP]
    x = load_tile(base, own, tokens, d, live, PAGE, D, FORMAT, transposed)
    some = d < tl.where(held > 0, D, 0)
    if KIND == "minmax":
        high = tl.max(tl.where(live[:, None], x, float("-inf")), 0)
        low = tl.min(tl.where(live[:, None], x, float("inf")), 0)
        tl.store(out + entry * 2 * D + d, high.to(out.dtype.element_ty), mask=some)
        tl.store(out + entry * 2 * D + D + d, low.to(out.dtype.element_ty), mask=some)
    if KIND == "mean":
        mean = tl.sum(x, 0) / tl.maximum(held, 1)
        tl.store(out + entry * D + d, mean.to(out.dtype.element_ty), mask=some)
    if KIND == "vmax":
        norm = tl.sqrt(tl.max(tl.sum(x * x, 1), 0))
        tl.store(out + entry, norm, mask=held > 0)
    if KIND == "submeans":
        per: tl.constexpr = PAGE // 16
        w = tl.arange(0, per)
        sums = tl.sum(tl.reshape(x, [per, 16, DP]), 1)
        counts = tl.minimum(tl.maximum(held - 16 * w, 0), 16)
        # the last run reaches into the next block
        page, more = _page(table, lens, valid, b, block + 1, NB, end, PAGE, HAS_VALID)
        more = tl.minimum(more, 16)
        t = tl.arange(0, 16)
        base = X + page * x_stride_p + h * x_stride_h
        own = scales + page * s_stride_p + h * s_stride_h
        after = tl.sum(load_tile(base, own, t, d, t < more, PAGE, D, FORMAT, False), 0)
        # [per, per] picks group w + 1 for run w
        next_group = w[None, :] == w[:, None] + 1
        shifted = tl.sum(tl.where(next_group[:, :, None], sums[None, :, :], 0.0), 1)
        last = w == per - 1
        shifted = tl.where(last[:, None], after[None, :], shifted)
        seen = counts + tl.where(last, more, tl.sum(tl.where(next_group, counts[None, :], 0), 1))
        mean = (sums + shifted) / tl.maximum(seen, 1).to(tl.float32)[:, None]
        known = seen > 0
        if STARTED:  # a write leaves no entry of its blocks as it was, and of the block before only the last
            known = last | (w + block >= w + (end - added) // PAGE)
        at = (entry * per + w)[:, None] * D + d[None, :]
        tl.store(out + at, mean.to(out.dtype.element_ty), mask=known[:, None] & inside[None, :])
    if KIND == "hadamard2":
        quarter: tl.constexpr = D // 4
        n: tl.constexpr = max(16, quarter)
        i = tl.arange(0, n)
        cut = tl.load(thresholds + h)
        x = x.to(tl.bfloat16) if X.dtype.element_ty == tl.bfloat16 else x
        codes = tl.zeros([PAGE, n], tl.int32)
        for part in range(4):
            y = rotated(x, part * quarter, n, D)
            code = (y > -cut).to(tl.int32) + (y > 0).to(tl.int32) + (y > cut).to(tl.int32)
            codes |= code << (2 * part)
        codes = tl.where(live[:, None], codes, 0).to(tl.uint8)
        at = (entry * PAGE + tokens)[:, None] * quarter + i[None, :]
        tl.store(out + at, codes, mask=(i < tl.where(held > 0, quarter, 0))[None, :])


def build_summary(
    kv: KVPages,
    block_table: Tensor,
    context_lens: Tensor,
    kind: str,
    first_block: int,
    data: Tensor,
    thresholds: Tensor | None,
) -> Tensor | None:
    _covered(kv, kind, data)
    if kind == "hadamard2" and thresholds is None:
        thresholds = spread(kv, block_table, context_lens, first_block)
    count = block_table.shape[1] - first_block
    _launch(kv, block_table, context_lens, kind, data, thresholds, first_block, count, 0)
    return thresholds


def update(kv: KVPages, table: Tensor, start_pos: Tensor, added: int, summary: BlockSummary) -> None:
    """Bring up to date the blocks that `added` tokens from `start_pos` on have touched."""
    page = kv.page_tokens
    back = int(summary.kind == "submeans")
    count = (added + page - 2) // page + 1 + back
    _launch(kv, table, start_pos, summary.kind, summary.data, None, -back, count, added)


def updatable(kv: KVPages, summary: BlockSummary) -> None:
    """Raise Uncovered unless `update` serves this summary."""
    _covered(kv, summary.kind, summary.data)
    if not summary.data.is_contiguous():
        raise Uncovered("a summary that is not contiguous")


def _covered(kv: KVPages, kind: str, data: Tensor) -> None:
    served(kv)
    if kind == "minmax" and data.dim() == 4:
        raise Uncovered("minmax in the layout of the CPU")
    most = 256 if kv.k.dtype == torch.bfloat16 else 128
    if kind == "hadamard2" and not 16 <= kv.head_dim <= most:
        raise Uncovered(f"hadamard2 of {kv.k.dtype}, head size {kv.head_dim}: 16 to {most} is served")


def _launch(
    kv: KVPages,
    table: Tensor,
    lens: Tensor,
    kind: str,
    data: Tensor,
    thresholds: Tensor | None,
    first: int,
    count: int,
    added: int,
) -> None:
    """`added` is 0 to build; else `lens` is where the write began, and `first` counts from its block."""
    batch, heads, size, page = len(table), kv.n_kv_heads, kv.head_dim, kv.page_tokens
    if batch == 0 or count <= 0:
        return
    x, scale = (kv.v, kv.v_scale) if kind == "vmax" else (kv.k, kv.k_scale)
    entries = {"submeans": page // 16, "hadamard2": page}.get(kind, 1)
    table = table.contiguous()
    valid = kv.page_valid if added == 0 else None
    wide = max(16, triton.next_power_of_2(size))
    row = pick(CONFIGS, arch_of(x), dim=wide, kind=KINDS[x.dtype])
    of_scale = (0, 0) if scale is None else (scale.stride(0), scale.stride(1))
    strides = (x.stride(0), x.stride(1), *of_scale)
    _summarise[(count, batch * heads)](
        x,
        x if scale is None else scale,
        table,
        lens.contiguous(),
        table if valid is None else valid.contiguous(),
        data if thresholds is None else thresholds.contiguous(),
        data,
        table.shape[1],
        data.shape[2] // entries,
        heads,
        first,
        added,
        *strides,
        PAGE=page,
        D=size,
        DP=wide,
        FORMAT=kv.format,
        KIND=kind,
        STARTED=added > 0,
        HAS_VALID=valid is not None,
        **row.launch,
    )
