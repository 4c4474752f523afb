"""The union of attentions in Triton, two parts at a time into a float32 running union.

A launch reads two parts and writes one, `3 B Hq T D` elements; n parts take n - 1 launches, or one that turns
a single part into the wanted dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from agentctx.kernels.gpu.configs import Config, arch_of, pick
from agentctx.kernels.records import Attention

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
CONFIGS = (
    Config(dim=64, blocks={"ROWS": 32}, warps=4, stages=1),
    Config(blocks={"ROWS": 8}, warps=4, stages=1),
)


def merge_lse(parts: Sequence[Attention], out_dtype: torch.dtype) -> Attention:
    merged = parts[0]
    for i, part in enumerate(parts[1:] or parts[:1]):
        last = i >= len(parts) - 2
        merged = _merge(merged, part, out_dtype if last else torch.float32, alone=len(parts) == 1)
    return merged


def _merge(a: Attention, b: Attention, out_dtype: torch.dtype, *, alone: bool) -> Attention:
    """The union of a and b, or with `alone` a by itself."""
    _, heads, tokens, size = a.out.shape
    out = torch.empty(a.out.shape, dtype=out_dtype, device=a.out.device)
    lse = torch.empty(a.lse.shape, dtype=torch.float32, device=a.out.device)
    rows = lse.numel()
    if out.numel() == 0:
        return Attention(out, lse)
    config = pick(CONFIGS, arch_of(out), dim=min(size, 256))
    n = config.blocks["ROWS"]
    merge_two[triton.cdiv(rows, n), triton.cdiv(size, 256)](
        *(a.out, b.out, a.lse, b.lse, out, lse, rows, heads, tokens),
        *(*a.out.stride(), *b.out.stride(), *a.lse.stride(), *b.lse.stride()),
        D=size,
        ROWS=n,
        DP=min(256, triton.next_power_of_2(size)),
        ALONE=alone,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return Attention(out, lse)


@triton.jit
def _weighted(Out, where, mask, lse, top):
    """A part's values with their weight; a part that saw nothing counts nothing, whatever it holds."""
    weight = tl.exp2((lse - top) * LOG2E)
    x = tl.load(Out + where, mask=mask & (lse != float("-inf"))[:, None], other=0.0).to(tl.float32)
    return weight, x * weight[:, None]


@triton.jit(do_not_specialize=["rows", "heads", "tokens"])
def merge_two(
    A,  # [B, Hq, T, D]
    B,
    LseA,  # [B, Hq, T]
    LseB,
    Out,  # [B, Hq, T, D], contiguous
    Lse,
    rows,
    heads,
    tokens,
    ab, ah, at, ad, bb, bh, bt, bd, lab, lah, lat, lbb, lbh, lbt,  # strides
    D: tl.constexpr,
    ROWS: tl.constexpr,
    DP: tl.constexpr,
    ALONE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * DP + tl.arange(0, DP)
    live = row < rows
    mask = live[:, None] & (d < D)[None, :]
    b, h, t = row // (heads * tokens), (row // tokens) % heads, row % tokens
    lse_a = tl.load(LseA + b * lab + h * lah + t * lat, mask=live, other=float("-inf"))
    lse_b = tl.load(LseB + b * lbb + h * lbh + t * lbt, mask=live, other=float("-inf"))
    if ALONE:
        lse_b = tl.full([ROWS], float("-inf"), tl.float32)
    top = tl.maximum(lse_a, lse_b, propagate_nan=tl.PropagateNan.ALL)
    safe = tl.where(top == float("-inf"), 0.0, top)
    wa, xa = _weighted(
        A, (b * ab + h * ah + t * at)[:, None] + d.to(tl.int64)[None, :] * ad, mask, lse_a, safe
    )
    wb, xb = _weighted(
        B, (b * bb + h * bh + t * bt)[:, None] + d.to(tl.int64)[None, :] * bd, mask, lse_b, safe
    )
    total = wa + wb
    out = (xa + xb) / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(Out + row[:, None] * D + d[None, :], out.to(Out.dtype.element_ty), mask=mask)
    if tl.program_id(1) == 0:
        lse = safe + tl.log2(tl.where(total == 0, 1.0, total)) * LN2
        tl.store(Lse + row, tl.where(total == 0, float("-inf"), lse), mask=live)
