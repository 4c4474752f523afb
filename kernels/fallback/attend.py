"""Softmax attention in float32 over gathered keys.

Torch's own CPU attention would be a little faster in bfloat16, but it returns a bfloat16 `out`, knows no soft
cap and reports an lse of 0 for a row without keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """q `[..., R, D]`, k and v `[..., N, D]`, `bias [..., R or 1, N]` added after the soft cap; float32.

    Returns out `[..., R, D]` and lse `[..., R]`; a row whose biases are all -inf has out 0 and lse -inf.
    """
    scores = (q * scale) @ k.transpose(-1, -2)
    if softcap > 0:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        scores += bias
    # The maximum is subtracted, not the lse: a large lse has too few digits left for the weights.
    top = scores.amax(-1, keepdim=True)
    if bias is not None:
        top = torch.where(top == -torch.inf, 0.0, top)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = top + total.log()
    if bias is not None:
        total = torch.where(total == 0, 1.0, total)
    return (weights @ v).div_(total), lse.squeeze(-1)
