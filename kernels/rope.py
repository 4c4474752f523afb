"""Rotary positions (RoFormer, Su et al. 2021): pairs of channels turned by an angle that grows with position.

    angle = float32(position) inv_freq,   (a, b) -> (a cos - b sin, b cos + a sin)

Pairs are channels i and i + R/2 ("half") or 2i and 2i + 1 ("interleaved") of the first R = `rotary_dim`.
Angles are rounded to float32 because the keys of a model were turned by such angles; so moving a key from one
position to another composes both rotations from their own angles, cos a cos b + sin a sin b and so on. To
turn by the difference of positions is wrong by the rounding of the angle: 0.2 per element near position one
million. Cost: the bytes of x once each way, about 3 FLOP an element, one cosine and sine for each token and
pair. Every rewrite of a bfloat16 key rounds: move from the original, never from a moved copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels import checks, choose


def rope(
    x: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    *,
    inverse: bool = False,
    style: str = "half",
    rotary_dim: int | None = None,
    attention_scaling: float = 1.0,
    out: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Turn x `[B, H, T, D]` to `positions`, int32 or int64 `[B, T]` or `[T]`.

    `inv_freq` float32 `[rotary_dim / 2]`; `rotary_dim` defaults to D, channels beyond it pass unchanged.
    `attention_scaling` multiplies the turned channels; `inverse` turns back and divides by it. `out`: x
    itself or a tensor like it that does not overlap it otherwise.

    Raises ValueError for an odd rotary size or anything that does not fit, TypeError for no tensors.
    """
    _rows(x, inv_freq, style, rotary_dim)
    _positions("positions", positions, x)
    if attention_scaling == 0:
        raise ValueError("attention_scaling is 0: a rotation times 0 has no inverse")
    if out is not None and (
        out.shape != x.shape or out.dtype != x.dtype or out.device != x.device or out.stride(3) != 1
    ):
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)} on {out.device}: {x.dtype} {list(x.shape)} on {x.device}, "
            "its last dimension contiguous, is needed"
        )
    options = (inverse, style, float(attention_scaling), out)
    turned: Tensor = choose.run("rope", impl, x.device, x, positions, inv_freq, *options)
    return turned


def rope_move(
    x: Tensor,
    old_positions: Tensor,
    new_positions: Tensor,
    inv_freq: Tensor,
    *,
    new_inv_freq: Tensor | None = None,
    style: str = "half",
    rotary_dim: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """Turn rows that stand at `old_positions` under `inv_freq` to `new_positions` under `new_inv_freq`.

    `new_inv_freq` defaults to `inv_freq`; an `attention_scaling` in x stays as it is. Everything else as in
    `rope`.
    """
    _rows(x, inv_freq, style, rotary_dim)
    _positions("old_positions", old_positions, x)
    _positions("new_positions", new_positions, x)
    to = inv_freq if new_inv_freq is None else new_inv_freq
    if to is not inv_freq:
        _frequencies("new_inv_freq", to, len(inv_freq), x)
    moved: Tensor = choose.run(
        "rope_move", impl, x.device, x, old_positions, new_positions, inv_freq, to, style
    )
    return moved


def _rows(x: Tensor, inv_freq: Tensor, style: str, rotary_dim: int | None) -> None:
    checks.tensor("x", x, 4)
    checks.floats("x", x)
    size = x.shape[3]
    if x.stride(3) != 1 and size > 1:
        raise ValueError(f"x has stride {x.stride(3)} in its last dimension: 1 is needed, x.contiguous()")
    rotary = size if rotary_dim is None else rotary_dim
    if rotary % 2 or not 0 < rotary <= size:
        raise ValueError(f"rotary_dim is {rotary}: an even number from 2 to the head size {size} is needed")
    if style not in ("half", "interleaved"):
        raise ValueError(f"style is {style!r}: half or interleaved is needed")
    _frequencies("inv_freq", inv_freq, rotary // 2, x)


def _frequencies(name: str, value: Tensor, count: int, x: Tensor) -> None:
    checks.tensor(name, value, 1)
    if value.dtype != torch.float32 or value.shape[0] != count or value.device != x.device:
        came = f"{value.dtype} {list(value.shape)} on {value.device}"
        raise ValueError(f"{name} is {came}: torch.float32 [{count}] on {x.device} is needed")


def _positions(name: str, value: Tensor, x: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}: a tensor is needed")
    batch, tokens = x.shape[0], x.shape[2]
    fits = value.shape in ((batch, tokens), (tokens,)) and value.dtype in (torch.int32, torch.int64)
    if not fits or value.device != x.device:
        came = f"{value.dtype} {list(value.shape)} on {value.device}"
        raise ValueError(
            f"{name} is {came}: int32 or int64 {[batch, tokens]} or {[tokens]} on {x.device} is needed"
        )
