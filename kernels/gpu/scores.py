"""Block scores as products of a tile of queries with a tile of the summary.

The G heads of a KV head, times as many tokens as fit, are the rows of one product; the heads are united in
registers, so a summary is read once and a score written once. `minmax` takes two products, of the parts of q
that meet the maxima and the minima. `hadamard2` stays on tensor cores: the level of a code is a sum of two
whole numbers, 0.5286 (2 c - 3) - 0.0758 sign, which float16 holds exactly, and the rotated query, scaled by
its largest element, is the sum of two float16 rows; so the estimate is right to float32. The Manhattan
distance is `sum a + sum_j (1 - 2 [a >= j]) . [c >= j]`, j = 1, 2, 3: whole numbers, exact.

Bytes: those of the summary once for each row tile (`Config.rows`), 4 a score. Limits: head sizes to 256,
pages of a power of two from 16 to 128 tokens (hadamard2, submeans); minmax in the GPU layout. A context
beyond the summary is not looked for: what the summary does not hold has no score.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentctx.kernels.errors import Uncovered
from agentctx.kernels.gpu.configs import Config, arch_of, pick
from agentctx.kernels.gpu.hadamard import rotate
from agentctx.kernels.records import BlockSummary

# BN: blocks of a tile; RUNS: runs of a tile; BT: tokens of a tile
CONFIGS = (
    Config(dim=64, kinds=("fp32",), blocks={"BN": 32}, warps=4, stages=1),
    Config(dim=128, kinds=("fp32",), blocks={"BN": 16}, warps=4, stages=1),
    Config(kinds=("fp32",), blocks={"BN": 16}, warps=8, stages=1),
    Config(dim=128, blocks={"BN": 64}, warps=4, stages=1),
    Config(blocks={"BN": 32}, warps=4, stages=1),
)
SUBMEANS = (
    Config(dim=64, kinds=("fp32",), blocks={"RUNS": 32}, warps=8, stages=1),
    Config(kinds=("fp32",), blocks={"RUNS": 16}, warps=8, stages=1),
    Config(dim=128, blocks={"RUNS": 64}, warps=4, stages=1),
    Config(blocks={"RUNS": 32}, warps=8, stages=1),
)
CODES = (
    Config(dim=128, blocks={"BT": 128}, warps=4, stages=1),
    Config(blocks={"BT": 128}, warps=8, stages=1),
)
POOL = Config(blocks={"BQ": 16}, warps=4, stages=1)
MAX_ROWS = 16  # rows of a tile: one instruction's worth
STEP = 16  # tokens between two means of `submeans`
_SHARE = tl.constexpr(0.98)  # of the root mean square: where codes are cut
_FINE = tl.constexpr(2048.0)  # what the second float16 row of a query is multiplied by


@triton.jit
def _best(x, axis: tl.constexpr):
    # maximum that keeps NaN
    odd = tl.max((x != x).to(tl.int32), axis)
    return tl.where(odd > 0, float("nan"), tl.max(x, axis))


@triton.jit
def _product(a, b):
    # [R, K] x [N, K] -> float32 [R, N]
    if a.dtype == b.dtype:
        s = tl.dot(a, tl.trans(b), input_precision="ieee")
    else:
        s = tl.dot(a.to(tl.float32), tl.trans(b.to(tl.float32)), input_precision="ieee")
    return s


@triton.jit
def _rows(tile, T, G: tl.constexpr, GP: tl.constexpr, R: tl.constexpr):
    # token and head of the group of every row, and which rows there are
    r = tl.arange(0, R)
    t, g = tile * (R // GP) + r // GP, r % GP
    return t, g, (g < G) & (t < T)


@triton.jit
def _limits(lens, q_pos, b, t, T, HAS_POS: tl.constexpr):
    limit = tl.load(lens + b) + t * 0
    if HAS_POS:
        limit = tl.minimum(limit, tl.load(q_pos + b * T + t, mask=t < T, other=-1) + 1)
    return limit


@triton.jit
def _write(
    s,  # [R, BN], not yet united
    out,  # [B, Hkv, T, NB], per head [B, Hkv G, T, NB]
    lens,
    q_pos,
    b,
    h,
    tile,
    blocks,
    T,
    NB,
    HKV,
    PAGE,
    G: tl.constexpr,
    GP: tl.constexpr,
    R: tl.constexpr,
    BN: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_POS: tl.constexpr,
):
    if GROUP == "none":
        t, g, live = _rows(tile, T, G, GP, R)
        head = (b * HKV + h) * G + g
    else:
        live = (tl.arange(0, R) % GP) < G
        each = tl.reshape(s, [R // GP, GP, BN])
        mask = tl.reshape(live, [R // GP, GP, 1])
        if GROUP == "max":
            s = _best(tl.where(mask, each, float("-inf")), 1)
        else:
            s = tl.sum(tl.where(mask, each, 0.0), 1)
            if GROUP == "mean":
                s = s / G
        t = tile * (R // GP) + tl.arange(0, R // GP)
        head = b * HKV + h + t * 0
        live = t < T
    limit = _limits(lens, q_pos, b, t, T, HAS_POS)
    s = tl.where(blocks[None, :] * PAGE < limit[:, None], s, float("-inf"))
    at = (head.to(tl.int64) * T + t) * NB
    tl.store(out + at[:, None] + blocks[None, :], s, mask=live[:, None] & (blocks < NB)[None, :])


@triton.jit
def _score(
    Q,
    data,
    lens,
    q_pos,
    out,
    T,
    NB,
    HKV,
    scale,
    q_stride_b,
    q_stride_h,
    q_stride_t,
    D: tl.constexpr,
    DP: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    R: tl.constexpr,
    BN: tl.constexpr,
    PAGE: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_POS: tl.constexpr,
):
    tile, pair = tl.program_id(0), tl.program_id(2).to(tl.int64)
    b, h = pair // HKV, pair % HKV
    blocks = tl.program_id(1) * BN + tl.arange(0, BN)
    d = tl.arange(0, DP)
    t, g, live = _rows(tile, T, G, GP, R)
    row = b * q_stride_b + (h * G + g) * q_stride_h + t.to(tl.int64) * q_stride_t
    end = tl.load(lens + b)  # what lies beyond is not read
    # [R, DP]
    q = tl.load(Q + row[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0)
    if KIND == "minmax":
        inside = ((blocks < NB) & (blocks * PAGE < end))[:, None] & (d < D)[None, :]
        at = (pair * NB + blocks)[:, None] * (2 * D) + d[None, :]
        up = (q > 0) == (scale > 0)
        s = _product(tl.where(up, q, 0.0).to(q.dtype), tl.load(data + at, mask=inside, other=0))
        s += _product(tl.where(up, 0.0, q).to(q.dtype), tl.load(data + at + D, mask=inside, other=0))
    else:
        if KIND == "mean":
            inside = ((blocks < NB) & (blocks * PAGE < end))[:, None] & (d < D)[None, :]
            at = (pair * NB + blocks)[:, None] * D + d[None, :]
            s = _product(q, tl.load(data + at, mask=inside, other=0))
        else:
            per: tl.constexpr = PAGE // 16
            run = tl.program_id(1) * (BN * per) + tl.arange(0, BN * per)
            inside = ((run < NB * per) & (run * 16 < end))[:, None] & (d < D)[None, :]
            at = (pair * NB * per + run)[:, None] * D + d[None, :]
            own = _product(q, tl.load(data + at, mask=inside, other=0)) * scale
            limit = _limits(lens, q_pos, b, t, T, HAS_POS)
            own = tl.where(run[None, :] * 16 < limit[:, None], own, float("-inf"))
            s = _best(tl.reshape(own, [R, BN, per]), 2)
            # the run before a block reaches into it
            inside = ((blocks > 0) & (blocks < NB) & (blocks * PAGE < end))[:, None] & (d < D)[None, :]
            at = (pair * NB * per + blocks * per - 1)[:, None] * D + d[None, :]
            before = _product(q, tl.load(data + at, mask=inside, other=0)) * scale
            before = tl.where(blocks[None, :] > 0, before, float("-inf"))
            s = tl.maximum(s, before, propagate_nan=tl.PropagateNan.ALL)
    if KIND != "submeans":
        s = s * scale
    _write(s, out, lens, q_pos, b, h, tile, blocks, T, NB, HKV, PAGE, G, GP, R, BN, GROUP, HAS_POS)


@triton.jit
def _quarter(Q, row, live, part: tl.constexpr, D: tl.constexpr, QP: tl.constexpr):
    # [R, QP]: channels part D / 4 and following of the rotated queries
    i = tl.arange(0, QP)
    inside = live[:, None] & (i < D // 4)[None, :]
    return tl.load(Q + row[:, None] * D + part * (D // 4) + i[None, :], mask=inside, other=0)


@triton.jit
def _score_codes(
    Q,  # rotated, float32 [B, Hkv G, T, D]
    data,
    thresholds,
    lens,
    q_pos,
    out,
    T,
    NB,
    HKV,
    scale,
    D: tl.constexpr,
    QP: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    R: tl.constexpr,
    BT: tl.constexpr,
    PAGE: tl.constexpr,
    MANHATTAN: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_POS: tl.constexpr,
):
    tile, pair = tl.program_id(0), tl.program_id(2).to(tl.int64)
    b, h = pair // HKV, pair % HKV
    quarter: tl.constexpr = D // 4
    tokens = tl.program_id(1) * BT + tl.arange(0, BT)
    i = tl.arange(0, QP)
    t, g, live = _rows(tile, T, G, GP, R)
    row = (pair * G + g) * T + t
    end = tl.minimum(tl.load(lens + b), NB * PAGE)  # what lies beyond is not read
    inside = (tokens < end)[:, None] & (i < quarter)[None, :]
    # [BT, QP] bytes of four codes
    codes = tl.load(data + (pair * NB * PAGE + tokens)[:, None] * quarter + i[None, :], mask=inside, other=0)
    size = tl.zeros([R], tl.float32)
    for part in tl.static_range(4):
        x = _quarter(Q, row, live, part, D, QP)
        size = size + tl.sum(x * x, 1) if MANHATTAN else tl.maximum(size, tl.max(tl.abs(x), 1))
    s = tl.zeros([R, BT], tl.float32)
    fine = tl.zeros([R, BT], tl.float32)
    cut = _SHARE * tl.sqrt(size / D)
    unit = tl.where(size > 0, size, 1.0)
    for part in tl.static_range(4):
        x = _quarter(Q, row, live, part, D, QP)
        c = ((codes >> (2 * part)) & 3).to(tl.int32)
        if MANHATTAN:
            a = (x > -cut[:, None]).to(tl.int32) + (x > 0).to(tl.int32) + (x > cut[:, None]).to(tl.int32)
            a = tl.where((i < quarter)[None, :], a, 0)
            s += tl.sum(a, 1).to(tl.float32)[:, None]
            for j in tl.static_range(1, 4):
                sign = tl.where(a >= j, -1.0, 1.0).to(tl.float16)
                s = tl.dot(sign, tl.trans((c >= j).to(tl.float16)), s)
        else:
            x = x / unit[:, None]
            level = (2 * c - 3).to(tl.float16)
            sign = tl.where(c >= 2, 1.0, -1.0).to(tl.float16)
            by_level, by_sign = x * 0.5286, x * -0.0758
            coarse_level, coarse_sign = by_level.to(tl.float16), by_sign.to(tl.float16)
            s = tl.dot(coarse_sign, tl.trans(sign), tl.dot(coarse_level, tl.trans(level), s))
            rest = ((by_level - coarse_level.to(tl.float32)) * _FINE).to(tl.float16)
            fine = tl.dot(rest, tl.trans(level), fine)
            rest = ((by_sign - coarse_sign.to(tl.float32)) * _FINE).to(tl.float16)
            fine = tl.dot(rest, tl.trans(sign), fine)
    if MANHATTAN:
        s = -s
    else:
        sigma = tl.load(thresholds + h) / _SHARE
        s = (s + fine / _FINE) * (unit * sigma * scale)[:, None]
    limit = _limits(lens, q_pos, b, t, T, HAS_POS)
    s = tl.where(tokens[None, :] < limit[:, None], s, float("-inf"))
    s = _best(tl.reshape(s, [R, BT // PAGE, PAGE]), 2)
    blocks = tl.program_id(1) * (BT // PAGE) + tl.arange(0, BT // PAGE)
    _write(s, out, lens, q_pos, b, h, tile, blocks, T, NB, HKV, PAGE, G, GP, R, BT // PAGE, GROUP, HAS_POS)


@triton.jit
def _pool(
    Q,
    out,
    H,
    T,
    M,
    block_q,
    stride_b,
    stride_h,
    stride_t,
    D: tl.constexpr,
    DP: tl.constexpr,
    BQ: tl.constexpr,
):
    m, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d, r = tl.arange(0, DP), tl.arange(0, BQ)
    start, end = m * block_q, tl.minimum(m * block_q + block_q, T)
    base = Q + pair // H * stride_b + pair % H * stride_h
    total = tl.zeros([DP], tl.float32)
    for first in range(start, end, BQ):
        t = first + r
        inside = (t < end)[:, None] & (d < D)[None, :]
        x = tl.load(base + t.to(tl.int64)[:, None] * stride_t + d[None, :], mask=inside, other=0)
        total += tl.sum(x.to(tl.float32), 0)
    tl.store(out + (pair * M + m) * D + d, total / (end - start), mask=d < D)


def block_scores(
    q: Tensor,
    summary: BlockSummary,
    context_lens: Tensor,
    q_pos: Tensor | None,
    group: str,
    per_head: bool,
    estimate: str,
    scale: float,
) -> Tensor:
    batch, heads, tokens, size = q.shape
    data, page, kind = summary.data, summary.page_tokens, summary.kind
    kv_heads = data.shape[1]
    _covered(q, summary)
    blocks = (
        data.shape[2] * (STEP if kind == "submeans" else 1) // (1 if kind in ("minmax", "mean") else page)
    )
    own = heads // kv_heads
    lead = heads if per_head else kv_heads
    out = torch.empty(batch, lead, tokens, blocks, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out
    padded = triton.next_power_of_2(own)
    rows = max(padded, min(MAX_ROWS, padded * triton.next_power_of_2(tokens)))
    grid_rows = triton.cdiv(tokens, rows // padded)  # may pass 65,535, the end of all axes but the first
    united = {"G": own, "GP": padded, "R": rows, "PAGE": page, "GROUP": "none" if per_head else group}
    lens = context_lens.contiguous()
    positions = lens if q_pos is None else q_pos.contiguous()
    united |= {"HAS_POS": q_pos is not None, "D": size}
    if kind == "hadamard2":
        assert summary.scale is not None
        row = pick(CODES, arch_of(q), dim=size, rows=rows)
        launch = row.launch | {"BT": max(page, row.blocks["BT"])}
        rotated = rotate(q, torch.float32)
        grid = (grid_rows, triton.cdiv(blocks * page, launch["BT"]), batch * kv_heads)
        codes = (rotated, data, summary.scale.contiguous(), lens, positions, out)
        exact = {"QP": max(16, size // 4), "MANHATTAN": estimate == "manhattan"}
        _score_codes[grid](*codes, tokens, blocks, kv_heads, scale, **united, **exact, **launch)
        return out
    wide = max(16, triton.next_power_of_2(size))
    dtype = "bf16" if q.dtype == data.dtype != torch.float32 else "fp32"
    table = SUBMEANS if kind == "submeans" else CONFIGS
    launch = pick(table, arch_of(q), dim=wide, rows=rows, kind=dtype).launch
    if kind == "submeans":
        launch["BN"] = launch.pop("RUNS") * STEP // page
    grid = (grid_rows, triton.cdiv(blocks, launch["BN"]), batch * kv_heads)
    shape = (tokens, blocks, kv_heads, scale, *q.stride()[:3])
    _score[grid](q, data, lens, positions, out, *shape, DP=wide, KIND=kind, **united, **launch)
    return out


def _covered(q: Tensor, summary: BlockSummary) -> None:
    """Raise Uncovered for what the kernels above do not serve."""
    data, page = summary.data, summary.page_tokens
    if summary.kind == "minmax" and data.dim() == 4:
        raise Uncovered("minmax in the layout of the CPU")
    if q.shape[3] > 256:
        raise Uncovered(f"head size {q.shape[3]}: up to 256 is served")
    if q.shape[1] // data.shape[1] > 64:
        raise Uncovered(f"{q.shape[1] // data.shape[1]} query heads a KV head: up to 64 are served")
    if summary.kind in ("submeans", "hadamard2") and page not in (16, 32, 64, 128):
        raise Uncovered(f"pages of {page} tokens: 16, 32, 64 or 128 are served")
    if summary.kind == "submeans" and q.shape[3] > 128 and not q.dtype == data.dtype != torch.float32:
        raise Uncovered(f"submeans in float32, head size {q.shape[3]}: up to 128 is served")
    if not data.is_contiguous():
        raise Uncovered("a summary that is not contiguous")


def pool_queries(q: Tensor, block_q: int) -> Tensor:
    batch, heads, tokens, size = q.shape
    count = triton.cdiv(tokens, block_q)
    out = torch.empty(batch, heads, count, size, dtype=torch.float32, device=q.device)
    if q.stride(3) != 1:
        q = q.contiguous()
    if out.numel():
        wide = triton.next_power_of_2(size)
        grid = (count, batch * heads)
        _pool[grid](q, out, heads, tokens, count, block_q, *q.stride()[:3], D=size, DP=wide, **POOL.launch)
    return out
