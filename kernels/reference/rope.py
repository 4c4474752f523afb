"""Rotary positions, a pair of channels at a time as one complex number in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def _rotation(positions: Tensor, inv_freq: Tensor) -> Tensor:
    """exp(i angle), `[B or 1, 1, T, rotary / 2]`; the angle itself is float32, as model code computes it."""
    angle = (positions.float().unsqueeze(-1) * inv_freq).unsqueeze(-3)
    return torch.polar(torch.ones_like(angle, dtype=torch.float64), angle.double())


def _turn(x: Tensor, rotation: Tensor, style: str) -> Tensor:
    half = rotation.shape[-1]
    first = slice(0, half) if style == "half" else slice(0, 2 * half, 2)
    second = slice(half, 2 * half) if style == "half" else slice(1, 2 * half, 2)
    pairs = torch.complex(x[..., first].double(), x[..., second].double()) * rotation
    turned = x.double()
    turned[..., first], turned[..., second] = pairs.real, pairs.imag
    return turned.to(x.dtype)


def rope(
    x: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    inverse: bool,
    style: str,
    attention_scaling: float,
    out: Tensor | None,
) -> Tensor:
    rotation = _rotation(positions, inv_freq) * attention_scaling
    turned = _turn(x, 1 / rotation if inverse else rotation, style)
    return turned if out is None else out.copy_(turned)


def rope_move(
    x: Tensor,
    old_positions: Tensor,
    new_positions: Tensor,
    inv_freq: Tensor,
    new_inv_freq: Tensor,
    style: str,
) -> Tensor:
    back = _rotation(old_positions, inv_freq)
    return _turn(x, _rotation(new_positions, new_inv_freq) / back, style)
