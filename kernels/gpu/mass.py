"""Attention mass in Triton: the matrix of probabilities exists one tile at a time.

    mass[n] = sum over heads h and rows t of heads[h] exp(s[h, t, n] - lse[h, t])

Pass 1, skipped where `lse` is given: the lse of every row, the context split over programs; the splits are
united by one torch call. Pass 2: a program is a tile of a page of one KV head (or query head); it goes over
the rows and adds up columns in a fixed order, so there are no atomics and results are reproducible. The G
heads of a KV head are rows of one product.

Cost of a pass, B = 1: `2 Hq T N D` FLOP, `Hkv N D bytes(K)`. Scratch: float32, 4 bytes a row and split, and
`Hkv N` of masses before heads are added up. Limits: those of `prefill`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentctx.kernels.gpu.configs import Config, processors
from agentctx.kernels.gpu.tiles import LN2, LOG2E, configuration, keys, page_valid, scores, strides, uncovered
from agentctx.kernels.records import KVPages

CONFIGS = (
    Config(dim=64, kinds=("fp32",), blocks={"BM": 32, "BN": 32}, warps=4, stages=2),
    Config(kinds=("fp32",), blocks={"BM": 16, "BN": 16}, warps=4, stages=2),
    Config(rows=16, dim=128, blocks={"BM": 16, "BN": 64}, warps=4, stages=3),
    Config(arch=90, dim=128, blocks={"BM": 64, "BN": 64}, warps=4, stages=3),
    Config(dim=128, blocks={"BM": 64, "BN": 64}, warps=8, stages=2),
    Config(rows=16, blocks={"BM": 16, "BN": 64}, warps=4, stages=2),
    Config(blocks={"BM": 64, "BN": 64}, warps=4, stages=2),
)


@triton.jit
def _rows_of(
    q, which, positions, offset, rows, q_h, q_t, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):
    """Queries `[BM, BD]` of the packed rows: head `which // rows` of the group, token `which % rows`."""
    token = which % rows
    channel = tl.arange(0, BD)
    at = (which // rows).to(tl.int64)[:, None] * q_h + token.to(tl.int64)[:, None] * q_t + channel[None, :]
    inside = which < GROUP * rows
    queries = tl.load(q + at, mask=inside[:, None] & (channel < D)[None, :], other=0.0)
    position = offset + token
    if positions is not None:
        position = tl.load(positions + token, mask=inside, other=-1)
    return queries, tl.where(inside, position, -1)


@triton.jit
def _hidden(sc, first, position, length, page, at, valid, BN: tl.constexpr):
    """Scores with -inf where a row does not see the token; `first` is the tile's first token."""
    token = first + tl.arange(0, BN)
    ordered = token[None, :] <= position[:, None]
    if valid is not None:
        held = tl.load(valid + page)
        ordered |= held >= 0
        length = tl.where(held >= 0, tl.minimum(length, first - at + held), length)
    return tl.where(ordered & (token < length)[None, :], sc, float("-inf"))


@triton.jit
def lse_kernel(
    q, k, k_scale, valid, table, lens, positions, partial,
    rows, splits, table_width, scale, softcap, q_b, q_h, q_t, k_p, k_h, v_p, v_h, ks_p, ks_h, vs_p, vs_h,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, CAPPED: tl.constexpr, FORMAT: tl.constexpr,
    PAGE: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of the G T rows, splits, B Hkv). Writes `partial [B, Hkv, G T, splits]`."""
    SUB: tl.constexpr = PAGE // BN
    DTYPE: tl.constexpr = q.dtype.element_ty
    split = tl.program_id(1)
    b, head = tl.program_id(2) // KV_HEADS, (tl.program_id(2) % KV_HEADS).to(tl.int64)
    length = tl.load(lens + b)
    which = tl.program_id(0) * BM + tl.arange(0, BM)
    q += b.to(tl.int64) * q_b + head * GROUP * q_h
    if positions is not None:
        positions += b * rows
    queries, position = _rows_of(q, which, positions, length - rows, rows, q_h, q_t, GROUP, D, BD)
    table += b.to(tl.int64) * table_width

    tiles = tl.cdiv(length, PAGE) * SUB
    share = tl.cdiv(tiles, splits)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for s in range(split * share, tl.minimum((split + 1) * share, tiles)):
        page = tl.load(table + s // SUB).to(tl.int64)
        at = s % SUB * BN
        k_tile = keys(k, k_scale, page, head, k_p, k_h, ks_p, ks_h, at, D, BN, BD, FORMAT, DTYPE)
        sc = scores(queries, k_tile, scale, softcap, CAPPED)
        sc = _hidden(sc, s * BN, position, length, page, at, valid, BN)
        peak = tl.maximum(top, tl.max(sc, 1))
        base = tl.where(peak == float("-inf"), 0.0, peak)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(sc - base[:, None]), 1)
        top = peak
    natural = tl.where(total == 0, float("-inf"), (top + tl.log2(total)) * LN2)
    at_row = tl.program_id(2).to(tl.int64) * (GROUP * rows) + which
    tl.store(partial + at_row * splits + split, natural, mask=which < GROUP * rows)


@triton.jit
def mass_kernel(
    q, k, k_scale, valid, table, lens, positions, lse, weights, mass,
    rows, table_width, scale, softcap, q_b, q_h, q_t, k_p, k_h, v_p, v_h, ks_p, ks_h, vs_p, vs_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr, BLOCKS: tl.constexpr, CAPPED: tl.constexpr,
    FORMAT: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid: (pages, HEADS, B), HEADS of GROUP query heads each, SHARE of them on one KV head.

    Writes `mass [B, HEADS, NB page]`, or with BLOCKS `[B, HEADS, NB]`; pages past the context get 0.
    """
    SUB: tl.constexpr = PAGE // BN
    DTYPE: tl.constexpr = q.dtype.element_ty
    block, b = tl.program_id(0), tl.program_id(2)
    head = tl.program_id(1).to(tl.int64)
    length = tl.load(lens + b)
    q += b.to(tl.int64) * q_b + head * GROUP * q_h
    if positions is not None:
        positions += b * rows
    at_head = b * HEADS + head
    lse += at_head * GROUP * rows
    weights += head * GROUP
    mass += at_head * table_width * (1 if BLOCKS else PAGE)
    whole = 0.0
    inside = block * PAGE < length
    page = tl.load(table + b.to(tl.int64) * table_width + block, mask=inside, other=0).to(tl.int64)
    for sub in tl.static_range(SUB):
        column = tl.zeros([BN], tl.float32)
        if inside:
            k_tile = keys(
                k, k_scale, page, head // SHARE, k_p, k_h, ks_p, ks_h, sub * BN, D, BN, BD, FORMAT, DTYPE
            )
            for first in range(0, GROUP * rows, BM):
                which = first + tl.arange(0, BM)
                queries, position = _rows_of(q, which, positions, length - rows, rows, q_h, q_t, GROUP, D, BD)
                sc = scores(queries, k_tile, scale, softcap, CAPPED)
                sc = _hidden(sc, block * PAGE + sub * BN, position, length, page, sub * BN, valid, BN)
                here = which < GROUP * rows
                natural = tl.load(lse + which, mask=here, other=float("-inf"))
                weight = tl.load(weights + which // rows, mask=here, other=0.0)
                nothing = tl.abs(natural) == float("inf")
                natural = tl.where(nothing, float("inf"), natural)  # a row without keys gives nothing
                p = tl.exp2(sc - (natural * LOG2E)[:, None]) * weight[:, None]
                column += tl.sum(p, 0)
        if BLOCKS:
            whole += tl.sum(column, 0)
        else:
            tl.store(mass + block.to(tl.int64) * PAGE + sub * BN + tl.arange(0, BN), column)
    if BLOCKS:
        tl.store(mass + block, whole)


def attention_mass(
    q: Tensor,
    kv: KVPages,
    block_table: Tensor,
    context_lens: Tensor,
    q_pos: Tensor | None,
    heads: Tensor | None,
    lse: Tensor | None,
    per: str,
    per_head: bool,
    scale: float,
    softcap: float,
) -> Tensor:
    uncovered(q, kv)
    batch, n_heads, rows, size = q.shape
    blocks, kv_heads = block_table.shape[1], kv.n_kv_heads
    group = n_heads // kv_heads
    table, lens = block_table.contiguous(), context_lens.contiguous()
    positions = None if q_pos is None else q_pos.contiguous()
    width = 1 if per == "block" else kv.page_tokens
    own, members = (n_heads, 1) if per_head else (kv_heads, group)
    mass = torch.empty((batch, own, blocks * width), dtype=torch.float32, device=q.device)
    if not mass.numel() or not rows:
        return mass.zero_() if per_head else mass.new_zeros(batch, blocks * width)
    config = configuration(CONFIGS, q, kv, group * rows)
    constants = config.launch | {
        "CAPPED": softcap > 0, "FORMAT": kv.format, "PAGE": kv.page_tokens, "D": size,
        "BN": min(config.blocks["BN"], kv.page_tokens), "BD": max(16, triton.next_power_of_2(size)),
    }  # fmt: skip
    options = (table.shape[1], scale * LOG2E.value, softcap, *q.stride()[:3], *strides(kv))
    pool = (q, kv.k, kv.k_scale, page_valid(kv), table, lens, positions)
    if lse is None:
        tiles = -(-group * rows // config.blocks["BM"])
        splits = max(1, min(blocks, 2 * processors(q.get_device()) // (tiles * batch * kv_heads)))
        partial = torch.empty((batch, n_heads, rows, splits), dtype=torch.float32, device=q.device)
        lse_kernel[(tiles, splits, batch * kv_heads)](
            *pool, partial, rows, splits, *options, KV_HEADS=kv_heads, GROUP=group, **constants
        )
        lse = partial.logsumexp(-1)
    weights = torch.ones(n_heads, device=q.device) if heads is None else heads.contiguous()
    mass_kernel[(blocks, own, batch)](
        *pool, lse.contiguous(), weights, mass, rows, *options,
        HEADS=own, GROUP=members, SHARE=own // kv_heads, BLOCKS=per == "block", **constants,
    )  # fmt: skip
    return mass if per_head else mass.sum(1)
