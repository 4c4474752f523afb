"""What the decode kernels share: a step of the running softmax, and the end of a split.

Scores are in base 2 inside (`log2(e)` is folded into the scale). A split that is not alone writes its part,
normalised, in float32, and takes a ticket; the program that takes the last ticket of a list has all parts
before it and unites them. So one launch does both, as long as the tickets start at 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def fetch(pointers, mask, WHOLE: tl.constexpr):
    """A load that has a mask only where it needs one: masked copies are narrower."""
    if WHOLE:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=mask, other=0)
    return x


@triton.jit
def capped(s, scale, softcap, CAPPED: tl.constexpr):
    """Scores in base 2 from products; `scale` and `softcap` hold log2(e) where they come last."""
    if CAPPED:  # c tanh(s / c): `scale` is 2 log2(e) scale / c, `softcap` is c log2(e)
        s = softcap * (1 - 2 / (1 + tl.exp2(s * scale)))
    else:
        s = s * scale
    return s


@triton.jit
def softmax_step(s, m, total):
    """Scores s [R, N] in base 2 join the running maximum m [R] and sum [R]: weights, factor of what was."""
    top = tl.maximum(m, tl.max(s, 1))
    safe = tl.where(top == float("-inf"), 0.0, top)  # -inf - -inf is NaN
    p = tl.exp2(s - safe[:, None])
    shrink = tl.exp2(m - safe)
    return p, shrink, top, total * shrink + tl.sum(p, 1)


@triton.jit
def put_part(Part, at, acc, total, rows, live, d, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """Write acc / total of the rows; `at` is the element where channel d = 0 of row 0 goes."""
    out = acc / tl.where(total == 0, 1.0, total)[:, None]
    where = at + rows.to(tl.int64)[:, None] * STRIDE + d[None, :]
    tl.store(Part + where, out.to(Part.dtype.element_ty), mask=live[:, None] & (d < SIZE)[None, :])


@triton.jit
def base2_lse(m, total):
    return tl.where(total == 0, float("-inf"), m + tl.log2(tl.where(total == 0, 1.0, total)))


@triton.jit
def unite(
    Out, Lse, Part, PartLse, first, splits, n_rows, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr
):
    """Unite the parts `[splits, n_rows, D]` of the list whose output rows start at `first`."""
    CHUNK: tl.constexpr = 1 if ROWS * DP >= 8192 else min(16, 8192 // (ROWS * DP))
    c, r, d = tl.arange(0, CHUNK), tl.arange(0, ROWS), tl.arange(0, DP)
    live = r < n_rows
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    for start in tl.range(0, splits, CHUNK, num_stages=1):
        here = start + c < splits
        row = first * splits + ((start + c) * n_rows).to(tl.int64)[:, None] + r[None, :]  # [C, R]
        seen = here[:, None] & live[None, :]
        # Past the first-level cache: other processors wrote this during the launch.
        lse = tl.load(PartLse + row, mask=seen, other=float("-inf"), cache_modifier=".cg")
        mask = seen[:, :, None] & (d < D)[None, None, :]
        part = tl.load(
            Part + row[:, :, None] * D + d[None, None, :], mask=mask, other=0.0, cache_modifier=".cg"
        )
        top = tl.maximum(m, tl.max(lse, 0))
        safe = tl.where(top == float("-inf"), 0.0, top)
        weight, shrink = tl.exp2(lse - safe[None, :]), tl.exp2(m - safe)
        total = total * shrink + tl.sum(weight, 0)
        acc = acc * shrink[:, None] + tl.sum(weight[:, :, None] * part, 0)
        m = top
    put_part(Out, first * D, acc, total, r, live, d, D, D)
    tl.store(Lse + first + r, base2_lse(m, total) * LN2, mask=live)


@triton.jit
def finish(
    Out,
    Lse,
    Part,
    PartLse,
    Ticket,
    list_index,
    split,
    splits,
    n_rows,
    low,
    high,
    m,
    total,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    HALVES: tl.constexpr,
    ALONE: tl.constexpr,
):
    """End a split: acc [ROWS, DP] is `low`, or with HALVES `low` and `high` hold D / 2 channels each."""
    HALF: tl.constexpr = D // 2 if HALVES else D
    HP: tl.constexpr = low.shape[1]
    r, d = tl.arange(0, ROWS), tl.arange(0, HP)
    live = r < n_rows
    first = list_index.to(tl.int64) * n_rows  # output row of row 0
    lse = base2_lse(m, total)
    if ALONE:
        put_part(Out, first * D, low, total, r, live, d, HALF, D)
        if HALVES:
            put_part(Out, first * D + HALF, high, total, r, live, d, HALF, D)
        tl.store(Lse + first + r, lse * LN2, mask=live)
    else:
        row = first * splits + split * n_rows
        put_part(Part, row * D, low, total, r, live, d, HALF, D)
        if HALVES:
            put_part(Part, row * D + HALF, high, total, r, live, d, HALF, D)
        tl.store(PartLse + row + r, lse, mask=live)
        tl.debug_barrier()  # every thread's part is written before one of them takes the ticket
        taken = tl.atomic_add(Ticket + list_index, 1, sem="acq_rel", scope="gpu")
        if taken == splits - 1:
            unite(Out, Lse, Part, PartLse, first, splits, n_rows, ROWS, D, DP)
