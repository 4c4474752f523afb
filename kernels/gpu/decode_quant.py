"""The decode kernel over int8 and int4 pages.

Channels are taken in two halves, as int4 pairs them. The K scale of a page is folded into q, which is split
into two bfloat16 parts, so that nothing of it is lost; codes are exact in bfloat16. The V scale multiplies
the page's P V. A tile never spans two pages, because their scales differ.
"""

from __future__ import annotations

import triton
import triton.language as tl

from agentctx.kernels.gpu.combine import capped, fetch, finish, softmax_step
from agentctx.kernels.gpu.listed import list_span, query_rows, slot_of, visible


@triton.jit
def _codes(X, low, high, mask, INT4: tl.constexpr, WHOLE: tl.constexpr):
    """Both halves of a tile of codes, exact in bfloat16; `low` and `high` are offsets."""
    if INT4:
        pairs = fetch(X + low, mask, WHOLE).to(tl.int8, bitcast=True)
        first = ((pairs << 4).to(tl.int8) >> 4).to(tl.bfloat16)
        second = (pairs >> 4).to(tl.bfloat16)
    else:
        first = fetch(X + low, mask, WHOLE).to(tl.bfloat16)
        second = fetch(X + high, mask, WHOLE).to(tl.bfloat16)
    return first, second


@triton.jit
def _product(q, scale, k, s):
    """s + (q scale) k for rows q [R, H], channel scales [H] and codes k [H, N]."""
    folded = q.to(tl.float32) * scale[None, :]
    top = folded.to(tl.bfloat16)
    rest = (folded - top.to(tl.float32)).to(tl.bfloat16)
    return tl.dot(rest, k, tl.dot(top, k, s))


@triton.jit(do_not_specialize=["sink_tokens", "slots", "splits", "tokens"])
def attend_quantised(
    Q,  # [B, Hq, T, D]
    K,  # int8 [P, Hkv, PAGE, D] or uint8 [P, Hkv, PAGE, D / 2]
    V,  # int8 [P, Hkv, D, PAGE] or uint8 [P, Hkv, D / 2, PAGE]
    KScale,  # bfloat16 [P, Hkv, D]
    VScale,
    Pages,  # int32 [B, L, S]
    Blocks,  # [B, L, S], not read by dense lists
    Counts,  # [B, L]
    Lens,  # [B]
    FirstPos,  # [B]
    PageValid,  # [P]
    TailK,  # [B, Hkv, PAGE, D] in the dtype of q, contiguous
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
    HALF: tl.constexpr = D // 2
    HP: tl.constexpr = DP // 2
    WHOLE: tl.constexpr = HALF == HP
    WIDTH: tl.constexpr = HALF if INT4 else D  # elements of a token's key
    n_rows = GROUP * tokens
    n, d, r = tl.arange(0, N), tl.arange(0, HP), tl.arange(0, ROWS)
    q0 = query_rows(Q, b, index * GROUP, tokens, n_rows, d, HALF, qb, qh, qt, ROWS)
    q1 = query_rows(Q + HALF, b, index * GROUP, tokens, n_rows, d, HALF, qb, qh, qt, ROWS)
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
    KScale += head * ksh
    VScale += head * vsh
    Pages += b.to(tl.int64) * pb + index.to(tl.int64) * pl
    Blocks += b.to(tl.int64) * bb + index.to(tl.int64) * bl
    open_block = context // PAGE
    open_seen = 0
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc0 = tl.zeros([ROWS, HP], tl.float32)
    acc1 = tl.zeros([ROWS, HP], tl.float32)
    for i in range(tile, stop):
        at, token, live = slot_of(i, n, count, sinks, skip, N, PAGE, SKIP)
        page = tl.load(Pages + at)
        block = at if DENSE else tl.load(Blocks + at)
        if TAIL:
            page = tl.where(block == open_block, 0, page)
            open_seen |= ((block == open_block) & (i % (PAGE // N) == 0)).to(tl.int32)
        row = page.to(tl.int64)
        k_at = (token * WIDTH)[None, :] + d[:, None]
        k0, k1 = _codes(K + row * kp, k_at, k_at + HALF, (d < HALF)[:, None], INT4, WHOLE)
        v_at = token[:, None] + d[None, :] * PAGE
        v0, v1 = _codes(V + row * vp, v_at, v_at + HALF * PAGE, (d < HALF)[None, :], INT4, WHOLE)
        ks0 = fetch(KScale + row * ksp + d, d < HALF, WHOLE).to(tl.float32)
        ks1 = fetch(KScale + row * ksp + HALF + d, d < HALF, WHOLE).to(tl.float32)
        vs0 = fetch(VScale + row * vsp + d, d < HALF, WHOLE).to(tl.float32)
        vs1 = fetch(VScale + row * vsp + HALF + d, d < HALF, WHOLE).to(tl.float32)
        valid = tl.load(PageValid + page) + tl.zeros([N], tl.int32) if VALID else n
        seen = visible(block * PAGE + token, token, live, own, first_pos, sink_tokens, valid, WINDOW, VALID)
        if TAIL:
            seen &= ((block != open_block) | (token < 0))[None, :]
        s = _product(q1, ks1, k1, _product(q0, ks0, k0, tl.zeros([ROWS, N], tl.float32)))
        s = capped(s, scale, softcap, CAPPED)
        p, shrink, m, total = softmax_step(tl.where(seen, s, float("-inf")), m, total)
        weights = p.to(tl.bfloat16)
        acc0 = acc0 * shrink[:, None] + tl.dot(weights, v0) * vs0[None, :]
        acc1 = acc1 * shrink[:, None] + tl.dot(weights, v1) * vs1[None, :]
    if TAIL:
        if open_seen != 0:
            lead = (b * (lists // SHARE) + index // SHARE).to(tl.int64) * PAGE * D
            for first in range(0, PAGE, N):
                token = first + n
                k_at = lead + (token * D)[None, :] + d[:, None]
                v_at = lead + (token * D)[:, None] + d[None, :]
                k0 = fetch(TailK + k_at, (d < HALF)[:, None], WHOLE)
                k1 = fetch(TailK + k_at + HALF, (d < HALF)[:, None], WHOLE)
                v0 = fetch(TailV + v_at, (d < HALF)[None, :], WHOLE)
                v1 = fetch(TailV + v_at + HALF, (d < HALF)[None, :], WHOLE)
                seen = visible(
                    open_block * PAGE + token, token, token >= 0, own, first_pos, sink_tokens, token,
                    WINDOW, False,
                )  # fmt: skip
                s = tl.dot(q1, k1, tl.dot(q0, k0, input_precision="ieee"), input_precision="ieee")
                s = capped(s, scale, softcap, CAPPED)
                p, shrink, m, total = softmax_step(tl.where(seen, s, float("-inf")), m, total)
                weights = p.to(v0.dtype)
                acc0 = tl.dot(weights, v0, acc0 * shrink[:, None], input_precision="ieee")
                acc1 = tl.dot(weights, v1, acc1 * shrink[:, None], input_precision="ieee")
    finish(
        Out, Lse, Part, PartLse, Ticket, b * lists + index, split, splits, n_rows,
        acc0, acc1, m, total, ROWS, D, DP, True, ALONE,
    )  # fmt: skip
