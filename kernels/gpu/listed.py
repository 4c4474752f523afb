"""What the decode kernels know of a list of pages: the part that a split reads, and who sees which token."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def query_rows(Q, b, first_head, tokens, n_rows, d, SIZE: tl.constexpr, rb, rh, rt, ROWS: tl.constexpr):
    """Rows r = g T + t of the heads from `first_head` on, [ROWS, len(d)]; 0 where there is none."""
    r = tl.arange(0, ROWS)
    head, token = (first_head + r // tokens).to(tl.int64), (r % tokens).to(tl.int64)
    where = Q + b.to(tl.int64) * rb + (head * rh + token * rt)[:, None] + d[None, :]
    return tl.load(where, mask=(r < n_rows)[:, None] & (d < SIZE)[None, :], other=0.0)


@triton.jit
def list_span(
    Counts, index, context, first_pos, sink_tokens, slots, split, splits,
    N: tl.constexpr, PAGE: tl.constexpr, DENSE: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Slots in use, first tile and end of this split, and of dense lists how a window cuts them.

    Slot i is i up to `sinks`, then i + skip: the blocks between are hidden from every row.
    """
    sinks, skip = 0, 0
    if DENSE:
        count = tl.minimum((context + PAGE - 1) // PAGE, slots)
        if SKIP:
            low = tl.minimum(tl.maximum(first_pos, 0) // PAGE, count)
            sinks = tl.minimum((sink_tokens + PAGE - 1) // PAGE, low)
            skip = low - sinks
            count -= skip
    else:
        count = tl.minimum(tl.load(Counts + index), slots)
    tiles = (count * PAGE + N - 1) // N
    share = (tiles + splits - 1) // splits
    start = split * share
    return count, sinks, skip, start, tl.minimum(start + share, tiles)


@triton.jit
def slot_of(tile, n, count, sinks, skip, N: tl.constexpr, PAGE: tl.constexpr, SKIP: tl.constexpr):
    """The slot of a tile (of each of its tokens where pages are smaller), places in the page, and use."""
    if PAGE >= N:
        at = tile // (PAGE // N)
        token = (tile % (PAGE // N)) * N + n
    else:
        at = tile * (N // PAGE) + n // PAGE
        token = n % PAGE
    live = (at < count) & (token >= 0)  # [N] in either case
    if SKIP:
        at = at + tl.where(at >= sinks, skip, 0)
    return at, token, live


@triton.jit
def visible(
    position, token, live, own, first_pos, sink_tokens, valid,
    WINDOW: tl.constexpr, VALID: tl.constexpr,
):  # fmt: skip
    """[ROWS, N]: which rows, at positions `own`, see which tokens; `valid` >= 0 counts tokens instead."""
    seen = position[None, :] <= own[:, None]
    if WINDOW:
        seen &= ((position < sink_tokens) | (position >= first_pos))[None, :]
    if VALID:
        seen = ((token < valid) & (valid >= 0))[None, :] | ((valid < 0)[None, :] & seen)
    return seen & live[None, :]
