"""Prefill in Triton: a program is a tile of rows of one query head, and reads K and V page by page.

    out = softmax(scale q K^T) V over the keys that a row sees

Tiles that every row sees as a whole come first and need no mask; then those that need one: the edges of a
window and its sinks, the diagonal, and everything where `page_valid` is given. Programs with the longest
reach start first, and those of one KV head run together, so that its keys stay in the L2 cache.

Cost: `4 D` FLOP for each pair of a row and a visible key; bytes of K and V once for each tile of rows.
Limits: D up to 256, paged, int8 and int4 pages (widened in the kernel); 16-bit products for 16-bit queries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentctx.kernels.gpu.configs import Config
from agentctx.kernels.gpu.tiles import (
    LOG2E,
    accumulate,
    configuration,
    finish,
    keys,
    page_valid,
    scores,
    strides,
    uncovered,
    values,
)
from agentctx.kernels.records import Attention, BlockSelection, KVPages

HALF = ("bf16", "fp16")
# A tile of 64 keys is a page. 128 rows halve what is read for each product; they need 8 warps, on 4 they
# spill. Quantised pages of 256 channels spill on Ampere: torch serves them.
CONFIGS = (
    Config(dim=64, kinds=("fp32",), blocks={"BM": 32, "BN": 32}, warps=4, stages=2),
    Config(kinds=("fp32",), blocks={"BM": 16, "BN": 16}, warps=4, stages=2),
    Config(dim=128, rows=16, blocks={"BM": 16, "BN": 64}, warps=4, stages=3),
    Config(kinds=HALF, rows=16, blocks={"BM": 16, "BN": 32}, warps=4, stages=3),
    Config(arch=90, dim=128, rows=64, blocks={"BM": 64, "BN": 64}, warps=4, stages=3),
    Config(arch=90, dim=128, blocks={"BM": 128, "BN": 64}, warps=8, stages=3),
    Config(arch=90, kinds=HALF, blocks={"BM": 64, "BN": 64}, warps=8, stages=2),
    Config(arch=90, blocks={"BM": 64, "BN": 32}, warps=8, stages=2),
    Config(dim=64, blocks={"BM": 64, "BN": 64}, warps=4, stages=3),
    Config(dim=128, kinds=HALF, rows=64, blocks={"BM": 64, "BN": 64}, warps=4, stages=2),
    Config(dim=128, kinds=HALF, blocks={"BM": 128, "BN": 64}, warps=8, stages=2),
    Config(dim=128, blocks={"BM": 64, "BN": 32}, warps=8, stages=2),
    Config(kinds=HALF, blocks={"BM": 64, "BN": 32}, warps=8, stages=2),
)
FAR = 1 << 30  # a window or sinks beyond every position


@triton.jit
def prefill_kernel(
    q, k, v, k_scale, v_scale, valid, pages, blocks, counts, table, lens, offsets, out, lse,
    rows, block_q, slots, table_width, scale, softcap, window, sinks,
    q_b, q_h, q_t, k_p, k_h, v_p, v_h, ks_p, ks_h, vs_p, vs_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, LISTS: tl.constexpr, MODE: tl.constexpr,
    HAS_VALID: tl.constexpr, CAPPED: tl.constexpr, FORMAT: tl.constexpr, PAGE: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid: (query blocks x tiles of a query block, Hq, B). MODE is dense, window or lists."""
    SUB: tl.constexpr = PAGE // BN  # tiles of a page
    tiles = tl.cdiv(block_q, BM)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, b = tl.program_id(1), tl.program_id(2)
    kv_head = (head // GROUP).to(tl.int64)
    i = tile // tiles
    first_row = i * block_q + (tile % tiles) * BM
    end_row = tl.minimum((i + 1) * block_q, rows)
    if first_row >= end_row:
        return

    # q [BM, BD]
    row = first_row + tl.arange(0, BM)
    channel = tl.arange(0, BD)
    DTYPE: tl.constexpr = q.dtype.element_ty
    q += b.to(tl.int64) * q_b + head.to(tl.int64) * q_h
    where = row.to(tl.int64)[:, None] * q_t + channel[None, :]
    queries = tl.load(q + where, mask=(row < end_row)[:, None] & (channel < D)[None, :], other=0.0)

    # Tiles of the context: [0, near_sinks) and [first, low) masked, [low, high) whole, [high, last) masked.
    offset, length = tl.load(offsets + b), tl.load(lens + b)
    start = offset + first_row
    end = offset + tl.minimum(first_row + BM, end_row)  # one past the last row's position
    position = offset + row
    table += b.to(tl.int64) * table_width
    last = tl.cdiv(tl.maximum(tl.minimum(end, length), 0), PAGE) * SUB
    high = tl.maximum(tl.minimum(start + 1, length), 0) // BN
    first = 0
    low = 0
    leading = 0  # masked tiles before `first`: sinks, or listed blocks that are not wholly in the context
    listed = table
    listed_blocks = table
    if MODE == "window":
        first = tl.minimum(tl.maximum(start - window + 1, 0) // PAGE * SUB, last)
        low = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(end - window, 0), BN), first), last)
        leading = tl.minimum(tl.cdiv(sinks, PAGE) * SUB, first)
    if MODE == "lists":
        which = (b * LISTS + head // (HEADS // LISTS)).to(tl.int64) * tl.cdiv(rows, block_q) + i
        listed = pages + which * slots
        listed_blocks = blocks + which * slots
        count = tl.load(counts + which) * SUB
        diagonal = tl.maximum(offset + i * block_q, 0) // PAGE * SUB
        last = tl.maximum(last, diagonal)
        high = tl.where(diagonal * BN <= length, count, 0)
        if HAS_VALID:
            high = 0
        leading = count - high
        before = leading
        resume = diagonal
    else:
        high = tl.maximum(high, low)
        if HAS_VALID:
            low = first
            high = first
        before = leading + low - first
        resume = high
    masked = before + last - resume

    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for s in range(low, high):
        page = tl.load(listed + s // SUB).to(tl.int64)
        at = s % SUB * BN
        k_tile = keys(k, k_scale, page, kv_head, k_p, k_h, ks_p, ks_h, at, D, BN, BD, FORMAT, DTYPE)
        sc = scores(queries, k_tile, scale, softcap, CAPPED)
        v_tile = values(v, v_scale, page, kv_head, v_p, v_h, vs_p, vs_h, at, D, PAGE, BN, BD, FORMAT, DTYPE)
        top, total, acc = accumulate(sc, v_tile, top, total, acc)

    for s in range(masked):
        if MODE == "lists":
            c = tl.load(listed_blocks + s // SUB, mask=s < before, other=0) * SUB + s % SUB
            c = tl.where(s < before, c, resume + s - before)
            page = tl.load(listed + s // SUB, mask=s < before, other=0)
            page += tl.load(table + c // SUB, mask=s >= before, other=0)
        else:
            c = tl.where(s < leading, s, tl.where(s < before, first + s - leading, resume + s - before))
            page = tl.load(table + c // SUB)
        page = page.to(tl.int64)
        at = c % SUB * BN
        k_tile = keys(k, k_scale, page, kv_head, k_p, k_h, ks_p, ks_h, at, D, BN, BD, FORMAT, DTYPE)
        sc = scores(queries, k_tile, scale, softcap, CAPPED)
        key = c * BN + tl.arange(0, BN)
        seen = (key < length)[None, :] & (key[None, :] <= position[:, None])
        if MODE == "window":
            seen &= (key[None, :] > position[:, None] - window) | (key < sinks)[None, :]
        if HAS_VALID:
            held = tl.load(valid + page)
            if held >= 0:
                # The last position of the page that the row could see, and whether it sees any.
                begin = c // SUB * PAGE
                newest = tl.minimum(tl.minimum(begin + PAGE, length) - 1, position)
                reached = newest >= begin
                if MODE == "window":
                    reached &= (newest > position - window) | (begin < sinks)
                if MODE == "lists":
                    reached |= s < before
                seen = reached[:, None] & (at + tl.arange(0, BN) < held)[None, :]
        sc = tl.where(seen, sc, float("-inf"))
        v_tile = values(v, v_scale, page, kv_head, v_p, v_h, vs_p, vs_h, at, D, PAGE, BN, BD, FORMAT, DTYPE)
        top, total, acc = accumulate(sc, v_tile, top, total, acc)

    # out [BM, BD], lse [BM]
    result, natural = finish(top, total, acc)
    rest = (b * HEADS + head).to(tl.int64) * rows + row
    seen_rows = row < end_row
    tl.store(
        out + rest[:, None] * D + channel[None, :],
        result.to(out.dtype.element_ty),
        mask=seen_rows[:, None] & (channel < D)[None, :],
    )
    tl.store(lse + rest, natural, mask=seen_rows)


def dense_prefill(
    q: Tensor,
    kv: KVPages,
    block_table: Tensor,
    context_lens: Tensor,
    q_offset: Tensor,
    scale: float,
    softcap: float,
    out_dtype: torch.dtype,
) -> Attention:
    tables = (block_table, context_lens, q_offset)
    return _launch("dense", q, kv, None, tables, 0, 0, 0, scale, softcap, out_dtype)


def window_prefill(
    q: Tensor,
    kv: KVPages,
    block_table: Tensor,
    context_lens: Tensor,
    window: int,
    sink_tokens: int,
    q_offset: Tensor,
    scale: float,
    softcap: float,
    out_dtype: torch.dtype,
) -> Attention:
    tables = (block_table, context_lens, q_offset)
    return _launch("window", q, kv, None, tables, 0, window, sink_tokens, scale, softcap, out_dtype)


def block_sparse_prefill(
    q: Tensor,
    kv: KVPages,
    selection: BlockSelection,
    block_table: Tensor,
    context_lens: Tensor,
    q_offset: Tensor,
    block_q: int,
    scale: float,
    softcap: float,
    out_dtype: torch.dtype,
) -> Attention:
    tables = (block_table, context_lens, q_offset)
    return _launch("lists", q, kv, selection, tables, block_q, 0, 0, scale, softcap, out_dtype)


def _launch(
    mode: str,
    q: Tensor,
    kv: KVPages,
    selection: BlockSelection | None,
    tables: tuple[Tensor, Tensor, Tensor],
    block_q: int,
    window: int,
    sinks: int,
    scale: float,
    softcap: float,
    out_dtype: torch.dtype,
) -> Attention:
    uncovered(q, kv)
    batch, heads, rows, size = q.shape
    out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not rows:
        return Attention(out, lse)
    config = configuration(CONFIGS, q, kv, min(rows, block_q or rows))
    block_m = config.blocks["BM"]
    block_q = block_q or block_m
    table, lens, offsets = (x.contiguous() for x in tables)
    # Without lists their pointers are never read.
    lists = tuple(x.contiguous() for x in selection) if selection else (table, table, table)
    grid = (-(-rows // block_q) * -(-block_q // block_m), heads, batch)
    k_scale, v_scale = kv.k_scale, kv.v_scale
    prefill_kernel[grid](
        q, kv.k, kv.v, k_scale, v_scale, page_valid(kv), *lists, table, lens, offsets, out, lse,
        rows, block_q, lists[0].shape[-1], table.shape[1], scale * LOG2E.value, softcap,
        min(window, FAR), min(sinks, FAR),
        *q.stride()[:3], *strides(kv),
        HEADS=heads, GROUP=heads // kv.n_kv_heads, LISTS=lists[2].shape[1] if selection else 1, MODE=mode,
        HAS_VALID=kv.page_valid is not None, CAPPED=softcap > 0, FORMAT=kv.format, PAGE=kv.page_tokens,
        D=size, BD=max(16, triton.next_power_of_2(size)),
        **(config.launch | {"BN": min(config.blocks["BN"], kv.page_tokens)}),
    )  # fmt: skip
    return Attention(out, lse)
