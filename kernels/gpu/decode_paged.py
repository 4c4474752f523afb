"""The decode kernel over pages of 16- or 32-bit floats."""

from __future__ import annotations

import triton
import triton.language as tl

from agentctx.kernels.gpu.combine import capped, fetch, finish, softmax_step
from agentctx.kernels.gpu.listed import list_span, query_rows, slot_of, visible


@triton.jit(do_not_specialize=["sink_tokens", "slots", "splits", "tokens"])
def attend_paged(
    Q,  # [B, Hq, T, D]
    K,  # [P, Hkv, PAGE, D]
    V,
    KScale,  # not read
    VScale,
    Pages,  # int32 [B, L, S]
    Blocks,  # [B, L, S], not read by dense lists
    Counts,  # [B, L]
    Lens,  # [B]
    FirstPos,  # [B]
    PageValid,  # [P]
    TailK,  # [B, Hkv, PAGE, D], contiguous
    TailV,
    Out,  # [B, Hq, T, D], contiguous
    Lse,
    Part,  # float32 [B, L, splits, rows, D]
    PartLse,
    Ticket,  # int32 [B, L], 0
    scale,
    softcap,
    sink_tokens,
    slots,
    splits,
    tokens,
    qb, qh, qt, kp, kh, vp, vh, ksp, ksh, vsp, vsh, pb, pl, bb, bl,  # strides
    GROUP: tl.constexpr,  # query heads of a list
    SHARE: tl.constexpr,  # lists of a KV head
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    N: tl.constexpr,
    DENSE: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOW: tl.constexpr,
    VALID: tl.constexpr,
    TAIL: tl.constexpr,
    ALONE: tl.constexpr,
    INT4: tl.constexpr,
):  # fmt: skip
    split, index, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lists = tl.num_programs(1)
    SKIP: tl.constexpr = DENSE and WINDOW and not VALID
    n_rows = GROUP * tokens
    n, d, r = tl.arange(0, N), tl.arange(0, DP), tl.arange(0, ROWS)
    q = query_rows(Q, b, index * GROUP, tokens, n_rows, d, D, qb, qh, qt, ROWS)
    context = tl.load(Lens + b)
    own = context - tokens + r % tokens
    first_pos = tl.load(FirstPos + b)
    count, sinks, skip, tile, stop = list_span(
        Counts, b * lists + index, context, first_pos, sink_tokens, slots, split, splits,
        N, PAGE, DENSE, SKIP,
    )  # fmt: skip
    head = (index // SHARE).to(tl.int64)
    K += head * kh
    V += head * vh
    Pages += b.to(tl.int64) * pb + index.to(tl.int64) * pl
    Blocks += b.to(tl.int64) * bb + index.to(tl.int64) * bl
    open_block = context // PAGE
    open_seen = 0
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    for i in range(tile, stop):
        at, token, live = slot_of(i, n, count, sinks, skip, N, PAGE, SKIP)
        if PAGE >= N:  # one page: its id is a number
            page = tl.load(Pages + at)
            block = at if DENSE else tl.load(Blocks + at)
        else:
            page = tl.load(Pages + at, mask=live, other=0)
            block = at if DENSE else tl.load(Blocks + at, mask=live, other=0)
        if TAIL:
            is_open = block == open_block
            page = tl.where(is_open, 0, page)
            if PAGE >= N:  # the split of its first tile reads all of the tail
                open_seen |= (is_open & (i % (PAGE // N) == 0)).to(tl.int32)
            else:
                open_seen |= tl.max((is_open & live).to(tl.int32), 0)
        row = page.to(tl.int64)
        k = fetch(K + (row * kp + token * D)[None, :] + d[:, None], (d < D)[:, None], D == DP)
        v = fetch(V + (row * vp + token * D)[:, None] + d[None, :], (d < D)[None, :], D == DP)
        valid = tl.load(PageValid + page) + tl.zeros([N], tl.int32) if VALID else n
        seen = visible(block * PAGE + token, token, live, own, first_pos, sink_tokens, valid, WINDOW, VALID)
        if TAIL:
            seen &= ((block != open_block) | (token < 0))[None, :]
        s = capped(tl.dot(q, k, input_precision="ieee"), scale, softcap, CAPPED)
        p, shrink, m, total = softmax_step(tl.where(seen, s, float("-inf")), m, total)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    if TAIL:
        if open_seen != 0:
            lead = (b * (lists // SHARE) + index // SHARE).to(tl.int64) * PAGE * D
            for first in range(0, PAGE, min(N, PAGE)):
                token = first + tl.arange(0, min(N, PAGE))
                k = fetch(TailK + lead + (token * D)[None, :] + d[:, None], (d < D)[:, None], D == DP)
                v = fetch(TailV + lead + (token * D)[:, None] + d[None, :], (d < D)[None, :], D == DP)
                seen = visible(
                    open_block * PAGE + token, token, token >= 0, own, first_pos, sink_tokens, token,
                    WINDOW, False,
                )  # fmt: skip
                s = capped(tl.dot(q, k, input_precision="ieee"), scale, softcap, CAPPED)
                p, shrink, m, total = softmax_step(tl.where(seen, s, float("-inf")), m, total)
                acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    finish(
        Out, Lse, Part, PartLse, Ticket, b * lists + index, split, splits, n_rows,
        acc, acc, m, total, ROWS, D, DP, False, ALONE,
    )  # fmt: skip
