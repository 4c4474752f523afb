"""Softmax attention over gathered keys."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """q `[B, L, R, D]`, k and v `[B, L, N, D]` in one dtype, float32 `bias [B, L, R or 1, N]`, N at least 1.

    The bias is added after the soft cap; None hides nothing. Returns out `[B, L, R, D]` in the dtype of q or
    float32, and float32 lse `[B, L, R]`; a row whose biases are all -inf has out 0 and lse -inf.
    """
    if softcap > 0 or q.device.type != "cpu":
        return _spelled_out(q.float(), k.float(), v.float(), bias, scale, softcap)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    # Called directly it does not look at strides: a last dimension that is not contiguous gives wrong values.
    out, lse = flash(q.contiguous(), k.contiguous(), v.contiguous(), attn_mask=bias, scale=scale)
    if bias is None:
        return out, lse
    # Torch reports an lse of 0 for a row without keys.
    return out, lse.masked_fill((bias == -torch.inf).all(-1), -torch.inf)


def _spelled_out(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """For what torch's fused attention lacks: a soft cap, or on a GPU an lse together with a bias."""
    scores = (q * scale) @ k.transpose(-1, -2)
    if softcap > 0:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        scores += bias
    # The maximum is subtracted, not the lse: a large lse has too few digits left for the weights.
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(torch.where(top == -torch.inf, 0.0, top)).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = torch.where(top == -torch.inf, top, top + total.log())
    return (weights @ v).div_(torch.where(total == 0, 1.0, total)), lse.squeeze(-1)
