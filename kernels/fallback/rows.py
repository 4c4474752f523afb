"""Softmax attention with its lse, by what torch has for it: SDPA's CPU kernel, or plain products in float32."""

from __future__ import annotations

import torch
from torch import Tensor

LOW = torch.finfo(torch.float32).min


def attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Rows q `[n, R, D]` over k, v `[n, N, D]`, N > 0; `seen` bool, broadcast to `[n, R, N]`.

    Returns out `[n, R, D]` and lse `[n, R]` float32; rows that see no key have out 0 and lse -inf.
    """
    if q.device.type == "cpu" and not softcap and q.shape[1] >= 16:
        bias = None
        if seen is not None:
            bias = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
            bias = bias.expand(*q.shape[:2], k.shape[1])[:, None]
        sdpa = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = sdpa(q[:, None], k[:, None], v[:, None], attn_mask=bias, scale=scale)
        out, lse = out[:, 0].float(), lse[:, 0]
        if seen is not None:  # its lse is 0 where a row sees nothing
            lse = lse.masked_fill(~seen.any(-1), -torch.inf)
        return out, lse
    scores = torch.matmul(q.float(), k.float().transpose(1, 2)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.clamp_min(LOW)[..., None])
    return torch.matmul(weights, v.float()), lse


def merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The attention over two disjoint sets of keys; in place of the first."""
    lse = torch.logaddexp(a[1], b[1])
    base = lse.clamp_min(LOW)
    out = a[0].mul_(torch.exp(a[1] - base)[..., None])
    return out.addcmul_(b[0], torch.exp(b[1] - base)[..., None]), lse
