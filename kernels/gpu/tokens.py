"""Attention to single tokens and to summary keys in Triton: keys gathered one by one, the rest as in decode.

Limits (else torch): head sizes that are multiples of 16 up to 256, at most 64 rows of a KV head (G T), pages
of format paged.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentctx.kernels.errors import Uncovered
from agentctx.kernels.gpu.combine import capped, fetch, finish, softmax_step
from agentctx.kernels.gpu.configs import KINDS, Config, arch_of, pick
from agentctx.kernels.gpu.listed import query_rows
from agentctx.kernels.gpu.splits import covered_rows, folded, outputs, workspace
from agentctx.kernels.records import Attention, KVPages

LOG2E = tl.constexpr(1.4426950408889634)
CONFIGS = (
    Config(kinds=("bf16", "fp16"), dim=128, rows=16, blocks={"N": 64}, warps=4, stages=5),
    Config(kinds=("bf16", "fp16"), dim=256, rows=64, blocks={"N": 32}, warps=8, stages=3),
    Config(kinds=("fp32",), dim=128, rows=16, blocks={"N": 32}, warps=8, stages=5),
    Config(kinds=("fp32",), dim=256, rows=64, blocks={"N": 16}, warps=8, stages=3),
)


def token_decode(
    q: Tensor,
    kv: KVPages,
    tokens: Tensor,
    counts: Tensor,
    scale: float,
    softcap: float,
    out_dtype: torch.dtype,
) -> Attention:
    if kv.format != "paged":
        raise Uncovered(f"single tokens of {kv.format} pages")
    if kv.n_pages == 0:
        raise Uncovered("a pool without pages")
    strides = (0, kv.k.stride(1), kv.k.stride(0), 0, kv.v.stride(1), kv.v.stride(0))
    if tokens.stride(2) != 1:
        tokens = tokens.contiguous()
    lists = (tokens, counts.contiguous(), (*tokens.stride()[:2], 1))
    return _launch(q, kv.k, kv.v, *lists, strides, kv.page_tokens, (scale, softcap, out_dtype))


def pseudo_attention(
    q: Tensor, k: Tensor, v: Tensor, log_weight: Tensor, scale: float, softcap: float, out_dtype: torch.dtype
) -> Attention:
    lists = (log_weight, log_weight, log_weight.stride())
    return _launch(q, k, v, *lists, (*k.stride()[:3], *v.stride()[:3]), 0, (scale, softcap, out_dtype))


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    counts: Tensor,
    key_strides: tuple[int, ...],
    strides: tuple[int, ...],
    page: int,
    options: tuple[float, float, torch.dtype],
) -> Attention:
    """`keys [B, Hkv, S]`: tokens of pages, or with `page` 0 the additive logits of given keys."""
    batch, heads, tokens, size = q.shape
    lists, slots = keys.shape[1:]
    scale, softcap, out_dtype = options
    rows = covered_rows(q, lists)
    out, lse = outputs(q, slots, out_dtype)
    if not (out.numel() and slots):
        return Attention(out, lse)
    config = pick(CONFIGS, arch_of(q), dim=size, rows=rows, kind=KINDS[q.dtype])
    parts = workspace(q, lists, -(-slots // config.blocks["N"]), None)
    attend_tokens[parts.splits, lists, batch](
        *(q, k, v, keys, counts, out, lse, parts.out, parts.lse, parts.tickets),
        *(*folded(scale, softcap), slots, parts.splits, tokens),
        *(*q.stride()[:3], *strides, *key_strides),
        GROUP=heads // lists,
        ROWS=triton.next_power_of_2(rows),
        D=size,
        DP=triton.next_power_of_2(size),
        PAGE=page,
        CAPPED=softcap > 0,
        ALONE=parts.splits == 1,
        N=config.blocks["N"],
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return Attention(out, lse)


@triton.jit(do_not_specialize=["slots", "splits", "tokens"])
def attend_tokens(
    Q,  # [B, Hq, T, D]
    K,  # [P, Hkv, PAGE, D], or without pages [B, Hkv, S, D]
    V,
    Keys,  # [B, Hkv, S]: int32 tokens, or float32 log weights
    Counts,  # int32 [B, Hkv], not read without pages
    Out,  # [B, Hq, T, D], contiguous
    Lse,
    Part,  # float32 [B, Hkv, splits, rows, D]
    PartLse,
    Ticket,  # int32 [B, Hkv], 0
    scale,
    softcap,
    slots,
    splits,
    tokens,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, lb, lh, lt,  # strides; kt and vt are those of pages
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    N: tl.constexpr,
    CAPPED: tl.constexpr,
    ALONE: tl.constexpr,
):  # fmt: skip
    split, index, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lists = tl.num_programs(1)
    n_rows = GROUP * tokens
    n, d = tl.arange(0, N), tl.arange(0, DP)
    q = query_rows(Q, b, index * GROUP, tokens, n_rows, d, D, qb, qh, qt, ROWS)
    count = slots
    if PAGE:
        count = tl.minimum(tl.load(Counts + b * lists + index), slots)
    share = ((count + N - 1) // N + splits - 1) // splits * N
    start = split * share
    stop = tl.minimum(start + share, count)
    wide_b, head = b.to(tl.int64), index.to(tl.int64)
    K += wide_b * kb + head * kh
    V += wide_b * vb + head * vh
    Keys += wide_b * lb + head * lh
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    for first in range(start, stop, N):
        slot = (first + n).to(tl.int64)
        live = slot < stop
        if PAGE:
            token = tl.load(Keys + slot, mask=live, other=0)
            page, place = (token // PAGE).to(tl.int64), (token % PAGE) * D
            k_at, v_at = page * kt + place, page * vt + place
            bias = tl.where(live, 0.0, float("-inf"))
        else:
            here = tl.where(live, slot, 0)
            k_at, v_at = here * kt, here * vt
            bias = tl.load(Keys + slot * lt, mask=live, other=float("-inf")) * LOG2E
        k = fetch(K + k_at[None, :] + d[:, None], (d < D)[:, None], D == DP)
        v = fetch(V + v_at[:, None] + d[None, :], (d < D)[None, :], D == DP)
        s = capped(tl.dot(q, k, input_precision="ieee"), scale, softcap, CAPPED) + bias[None, :]
        p, shrink, m, total = softmax_step(s, m, total)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    finish(
        Out, Lse, Part, PartLse, Ticket, b * lists + index, split, splits, n_rows,
        acc, acc, m, total, ROWS, D, DP, False, ALONE,
    )  # fmt: skip
