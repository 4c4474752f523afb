"""Rotary positions in plain tensor operations; float32 inside, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor


def _angles(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine `[B or 1, 1, T, rotary / 2]`."""
    angle = (positions.float().unsqueeze(-1) * inv_freq).unsqueeze(-3)
    return angle.cos(), angle.sin()


def _turn(x: Tensor, cos: Tensor, sin: Tensor, style: str, out: Tensor | None) -> Tensor:
    half = cos.shape[-1]
    rotary = x[..., : 2 * half].float()
    if style == "half":
        a, b = rotary[..., :half], rotary[..., half:]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    else:
        a, b = rotary[..., 0::2], rotary[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    to = torch.empty_like(x) if out is None else out
    to[..., : 2 * half] = turned
    to[..., 2 * half :] = x[..., 2 * half :]
    return to


def rope(
    x: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    inverse: bool,
    style: str,
    attention_scaling: float,
    out: Tensor | None,
) -> Tensor:
    cos, sin = _angles(positions, inv_freq)
    if inverse:
        return _turn(x, cos / attention_scaling, -sin / attention_scaling, style, out)
    return _turn(x, cos * attention_scaling, sin * attention_scaling, style, out)


def rope_move(
    x: Tensor,
    old_positions: Tensor,
    new_positions: Tensor,
    inv_freq: Tensor,
    new_inv_freq: Tensor,
    style: str,
) -> Tensor:
    old_cos, old_sin = _angles(old_positions, inv_freq)
    cos, sin = _angles(new_positions, new_inv_freq)
    return _turn(x, cos * old_cos + sin * old_sin, sin * old_cos - cos * old_sin, style, None)
