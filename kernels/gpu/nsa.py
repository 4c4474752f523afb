"""Native sparse attention in Triton: two kernels for the compressed keys, then the two prefills.

    out = g_cmp out_cmp + g_slc out_slc + g_win out_win

The first kernel is attention to the compressed keys; the second takes its lse, recomputes the probabilities
and adds them up to the importance of the selection blocks. A selection block of R strides gets from each
compressed block as many shares as they have strides in common, so with W = cmp_block / cmp_stride

    importance[j] = sum over -W < o < R of c(o) p[j R + o],   c(o) pairs 0 <= r < R, 0 <= w < W with r - w = o

and a tile of selection blocks needs R + W - 1 products with keys R apart, and no scatter. Cost of the two for
B = 1: `2 Hq D T NC (1 + (R + W - 1) / 2 R)` FLOP; scratch `4 Hkv T NB` bytes of importance. Limits: those of
`prefill`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentctx.kernels import choose
from agentctx.kernels.gpu.configs import Config
from agentctx.kernels.gpu.prefill import window_prefill
from agentctx.kernels.gpu.tiles import LOG2E, accumulate, configuration, finish, scores, uncovered
from agentctx.kernels.gpu.token_prefill import token_sparse_prefill
from agentctx.kernels.records import BlockSelection, KVPages

# BN compressed keys, or selection blocks.
CONFIGS = (
    Config(dim=64, kinds=("fp32",), blocks={"BM": 32, "BN": 32}, warps=4, stages=2),
    Config(kinds=("fp32",), blocks={"BM": 16, "BN": 16}, warps=8, stages=1),
    Config(rows=16, dim=128, blocks={"BM": 16, "BN": 64}, warps=4, stages=3),
    Config(rows=16, blocks={"BM": 16, "BN": 32}, warps=4, stages=2),
    Config(arch=90, dim=128, blocks={"BM": 64, "BN": 64}, warps=4, stages=3),
    Config(dim=128, blocks={"BM": 64, "BN": 64}, warps=8, stages=2),
    Config(arch=90, blocks={"BM": 64, "BN": 64}, warps=8, stages=2),
    Config(blocks={"BM": 32, "BN": 32}, warps=4, stages=2),
)


@triton.jit
def compressed_kernel(
    q, k, v, offsets, out, lse, rows, n_compressed, block, stride, scale,
    q_b, q_h, q_t, k_b, k_h, k_n, v_b, v_h, v_n,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of T, Hq, B). A row at p sees the keys i with `i stride + block - 1 <= p`."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tile * BM + tl.arange(0, BM)
    channel = tl.arange(0, BD)
    inside = (row < rows)[:, None] & (channel < D)[None, :]
    q += b * q_b + head.to(tl.int64) * q_h
    queries = tl.load(q + row.to(tl.int64)[:, None] * q_t + channel[None, :], mask=inside, other=0.0)
    k += b * k_b + (head // GROUP).to(tl.int64) * k_h
    v += b * v_b + (head // GROUP).to(tl.int64) * v_h

    visible = tl.maximum(tl.load(offsets + b) + row - block + 1 + stride, 0) // stride
    end = tl.minimum(tl.max(visible, 0), n_compressed)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for first in range(0, end, BN):
        i = first + tl.arange(0, BN)
        here = i < n_compressed
        at = i.to(tl.int64)
        k_tile = tl.load(
            k + at[None, :] * k_n + channel[:, None], mask=here[None, :] & (channel < D)[:, None], other=0.0
        )
        sc = scores(queries, k_tile, scale, 0.0, False)
        sc = tl.where((i[None, :] < visible[:, None]) & here[None, :], sc, float("-inf"))
        v_tile = tl.load(
            v + at[:, None] * v_n + channel[None, :], mask=here[:, None] & (channel < D)[None, :], other=0.0
        )
        top, total, acc = accumulate(sc, v_tile, top, total, acc)
    result, natural = finish(top, total, acc)
    rest = (b * HEADS + head) * rows + row
    tl.store(out + rest[:, None] * D + channel[None, :], result, mask=inside)
    tl.store(lse + rest, natural, mask=row < rows)


@triton.jit
def importance_kernel(
    q, k, offsets, lse, importance, rows, n_compressed, n_blocks, block, stride, scale,
    q_b, q_h, q_t, k_b, k_h, k_n,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of T, tiles of selection blocks, B Hkv). Writes `importance [B, Hkv, T, NB]`."""
    b = (tl.program_id(2) // KV_HEADS).to(tl.int64)
    head = (tl.program_id(2) % KV_HEADS).to(tl.int64)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    channel = tl.arange(0, BD)
    inside = (row < rows)[:, None] & (channel < D)[None, :]
    visible = tl.maximum(tl.load(offsets + b) + row - block + 1 + stride, 0) // stride
    visible = tl.minimum(visible, n_compressed)
    q += b * q_b + head * GROUP * q_h
    k += b * k_b + head * k_h
    lse += (b * KV_HEADS + head) * GROUP * rows
    shares = tl.zeros([BM, BN], tl.float32)
    if tl.program_id(1) * BN * R - W < tl.max(visible, 0):
        for step in range(R + W - 1):
            o = step - W + 1
            common = tl.minimum(R - 1, o + W - 1) - tl.maximum(o, 0) + 1  # pairs r - w = o
            i = column * R + o
            here = (i >= 0) & (i < n_compressed)
            at = k + i.to(tl.int64)[None, :] * k_n + channel[:, None]
            k_tile = tl.load(at, mask=here[None, :] & (channel < D)[:, None], other=0.0)
            seen = (i[None, :] < visible[:, None]) & here[None, :]
            for member in range(GROUP):
                where = q + member * q_h + row.to(tl.int64)[:, None] * q_t + channel[None, :]
                queries = tl.load(where, mask=inside, other=0.0)
                natural = tl.load(lse + member * rows + row, mask=row < rows, other=float("inf"))
                sc = scores(queries, k_tile, scale, 0.0, False)
                p = tl.exp2(sc - (natural * LOG2E)[:, None])
                shares += tl.where(seen, p, 0.0) * common
    to = importance + (tl.program_id(2).to(tl.int64) * rows + row)[:, None] * n_blocks + column[None, :]
    tl.store(to, shares, mask=(row < rows)[:, None] & (column < n_blocks)[None, :])


def nsa_forward(
    q: Tensor,
    cmp: tuple[Tensor, Tensor],
    slc: KVPages,
    win: KVPages,
    gates: Tensor,
    tables: tuple[Tensor, Tensor],
    cmp_block: int,
    cmp_stride: int,
    n_selected: int,
    window: int,
    q_offset: Tensor,
    scale: float,
) -> tuple[Tensor, BlockSelection]:
    uncovered(q, slc)
    uncovered(q, win)
    rows, page = q.shape[2], slc.page_tokens
    compressed, importance = _compressed(q, cmp, slc, cmp_block, cmp_stride, q_offset, scale)
    position = q_offset[:, None] + torch.arange(rows, dtype=torch.int32, device=q.device)
    reach = (position.clamp_min(-page) // page + 1).clamp_max(importance.shape[3])
    blocks, counts = choose.run(
        "topk_blocks", None, q.device, importance, reach.to(torch.int32), n_selected, 1, 2
    )
    held = torch.arange(n_selected, device=q.device) < counts[..., None]
    table = tables[0][:, None, None].expand(*blocks.shape[:3], -1)
    pages = torch.where(held, table.gather(3, blocks.long()), 0)
    selection = BlockSelection(pages, blocks, counts)
    lens = (q_offset + rows).clamp_min(0)
    options = (q_offset, scale, 0.0, torch.float32)
    selected = token_sparse_prefill(q, slc, selection, lens, *options).out
    near = window_prefill(q, win, tables[1], lens, window, 0, *options).out
    out = compressed * gates[..., :1].float()
    out += selected * gates[..., 1:2].float()
    out += near * gates[..., 2:].float()
    return out.to(q.dtype), selection


def _compressed(
    q: Tensor,
    cmp: tuple[Tensor, Tensor],
    slc: KVPages,
    cmp_block: int,
    cmp_stride: int,
    q_offset: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The compressed branch `[B, Hq, T, D]` and the importance `[B, Hkv, T, NB]`, float32."""
    batch, heads, rows, size = q.shape
    kv_heads, n_blocks = slc.n_kv_heads, slc.n_pages // batch
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in cmp)
    n_compressed = k.shape[2]
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    importance = torch.empty((batch, kv_heads, rows, n_blocks), dtype=torch.float32, device=q.device)
    if not rows:
        return out, importance
    config = configuration(CONFIGS, q, slc, rows)
    tiles = -(-rows // config.blocks["BM"])
    scaled = scale * LOG2E.value
    offsets = q_offset.contiguous()
    constants = config.launch | {
        "GROUP": heads // kv_heads, "D": size, "BD": max(16, triton.next_power_of_2(size))
    }  # fmt: skip
    compressed_kernel[(tiles, heads, batch)](
        q, k, v, offsets, out, lse, rows, n_compressed, cmp_block, cmp_stride, scaled,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], HEADS=heads, **constants,
    )  # fmt: skip
    importance_kernel[(tiles, -(-n_blocks // config.blocks["BN"]), batch * kv_heads)](
        q, k, offsets, lse, importance, rows, n_compressed, n_blocks, cmp_block, cmp_stride, scaled,
        *q.stride()[:3], *k.stride()[:3],
        KV_HEADS=kv_heads, R=slc.page_tokens // cmp_stride, W=cmp_block // cmp_stride, **constants,
    )  # fmt: skip
    return out, importance
