"""Rotary positions: a program turns some tokens of all heads of a sequence, with one cosine and sine for all.

The angle is float32, as the reference has it; before its cosine is taken it is brought to [-pi, pi] in
float64, since the hardware's cosine is only good there. Cost: the bytes of x once each way.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentctx.kernels.errors import Uncovered
from agentctx.kernels.gpu.configs import Config, arch_of, pick

# `dim` is the number of pairs, padded; BT tokens of a program
CONFIGS = (
    Config(dim=32, blocks={"BT": 16}, warps=4, stages=1),
    Config(dim=64, blocks={"BT": 8}, warps=4, stages=1),
    Config(dim=256, blocks={"BT": 4}, warps=4, stages=1),
)
HEADS = 4  # heads of a program
_TURN = tl.constexpr(2 * math.pi)


@triton.jit
def _rotation(positions, frequency, b, t, live, stride_b, stride_t):
    # cosine and sine [BT, HP]
    position = tl.load(positions + b * stride_b + t * stride_t, mask=live, other=0)
    angle = position.to(tl.float32)[:, None] * frequency[None, :]
    wide = angle.to(tl.float64)
    rest = (wide - _TURN * tl.floor(wide / _TURN + 0.5)).to(tl.float32)
    return tl.cos(rest), tl.sin(rest)


@triton.jit
def _rope(
    X,
    out,
    positions,
    inv_freq,
    old_positions,
    old_inv_freq,
    H,
    T,
    factor,  # of the turned channels
    x_stride_b,
    x_stride_h,
    x_stride_t,
    o_stride_b,
    o_stride_h,
    o_stride_t,
    p_stride_b,
    p_stride_t,
    old_stride_b,
    old_stride_t,
    D: tl.constexpr,
    HALF: tl.constexpr,  # pairs
    HP: tl.constexpr,
    REST: tl.constexpr,  # channels that pass, padded; 0: none to copy
    BT: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    MOVE: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    live, i = t < T, tl.arange(0, HP)
    inside = live[:, None] & (i < HALF)[None, :]
    cos, sin = _rotation(
        positions,
        tl.load(inv_freq + i, mask=i < HALF, other=0),
        b,
        t,
        live,
        p_stride_b,
        p_stride_t,
    )
    if MOVE:
        # from the old place to the new: both rotations from their own angles
        old = tl.load(old_inv_freq + i, mask=i < HALF, other=0)
        old_cos, old_sin = _rotation(old_positions, old, b, t, live, old_stride_b, old_stride_t)
        moved = cos * old_cos + sin * old_sin
        sin = sin * old_cos - cos * old_sin
        cos = moved
    if INVERSE:
        sin = -sin
    cos, sin = cos * factor, sin * factor
    t = t.to(tl.int64)
    for n in range(HEADS):
        h = tl.program_id(1) * HEADS + n
        if h < H:
            source = X + b * x_stride_b + h.to(tl.int64) * x_stride_h + t[:, None] * x_stride_t
            target = out + b * o_stride_b + h.to(tl.int64) * o_stride_h + t[:, None] * o_stride_t
            if INTERLEAVED:
                c = tl.arange(0, 2 * HP)
                both = live[:, None] & (c < 2 * HALF)[None, :]
                x = tl.load(source + c[None, :], mask=both, other=0).to(tl.float32)
                first, second = tl.split(tl.reshape(x, [BT, HP, 2]))
                pair = tl.join(first * cos - second * sin, second * cos + first * sin)
                turned = tl.reshape(pair, [BT, 2 * HP])
                tl.store(target + c[None, :], turned.to(out.dtype.element_ty), mask=both)
            else:
                first = tl.load(source + i[None, :], mask=inside, other=0).to(tl.float32)
                second = tl.load(source + HALF + i[None, :], mask=inside, other=0).to(tl.float32)
                a, e = first * cos - second * sin, second * cos + first * sin
                tl.store(target + i[None, :], a.to(out.dtype.element_ty), mask=inside)
                tl.store(target + HALF + i[None, :], e.to(out.dtype.element_ty), mask=inside)
            if REST:
                c = 2 * HALF + tl.arange(0, REST)
                beyond = live[:, None] & (c < D)[None, :]
                tl.store(target + c[None, :], tl.load(source + c[None, :], mask=beyond, other=0), mask=beyond)


def rope(
    x: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    inverse: bool,
    style: str,
    attention_scaling: float,
    out: Tensor | None,
) -> Tensor:
    factor = 1 / attention_scaling if inverse else attention_scaling
    return _launch(x, positions, inv_freq, None, None, style, factor, inverse, out)


def rope_move(
    x: Tensor,
    old_positions: Tensor,
    new_positions: Tensor,
    inv_freq: Tensor,
    new_inv_freq: Tensor,
    style: str,
) -> Tensor:
    return _launch(x, new_positions, new_inv_freq, old_positions, inv_freq, style, 1.0, False, None)


def _launch(
    x: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    old_positions: Tensor | None,
    old_inv_freq: Tensor | None,
    style: str,
    factor: float,
    inverse: bool,
    out: Tensor | None,
) -> Tensor:
    batch, heads, tokens, size = x.shape
    half = len(inv_freq)
    if half > 256:
        raise Uncovered(f"{half} pairs of channels: up to 256 are served")
    out = torch.empty_like(x) if out is None else out
    if not x.numel():
        return out
    padded = triton.next_power_of_2(half)
    row = pick(CONFIGS, arch_of(x), dim=padded)
    rest = 0 if 2 * half == size or out is x else triton.next_power_of_2(size - 2 * half)
    old = positions if old_positions is None else old_positions
    steps = [s for p in (positions, old) for s in ((0, p.stride(0)) if p.dim() == 1 else p.stride())]
    grid = (triton.cdiv(tokens, row.blocks["BT"]), triton.cdiv(heads, HEADS), batch)
    _rope[grid](
        x,
        out,
        positions,
        inv_freq.contiguous(),
        old,
        inv_freq if old_inv_freq is None else old_inv_freq.contiguous(),
        heads,
        tokens,
        factor,
        *x.stride()[:3],
        *out.stride()[:3],
        *steps,
        D=size,
        HALF=half,
        HP=padded,
        REST=rest,
        HEADS=HEADS,
        INTERLEAVED=style == "interleaved",
        INVERSE=inverse,
        MOVE=old_positions is not None,
        **row.launch,
    )
    return out
