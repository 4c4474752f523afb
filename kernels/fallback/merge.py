"""The union of attentions in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from agentctx.kernels.records import Attention


def merge_lse(parts: Sequence[Attention], out_dtype: torch.dtype) -> Attention:
    lses = torch.stack([part.lse for part in parts])
    top = lses.amax(0)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = (lses - top).exp_()
    total = weights.sum(0)
    lse = top + total.log()
    shares = weights / torch.where(total == 0, 1.0, total)
    out = torch.zeros(parts[0].out.shape, device=top.device)
    for part, share in zip(parts, shares, strict=True):
        empty = (part.lse == -torch.inf)[..., None]
        out += torch.where(empty, 0.0, share[..., None] * part.out.float())
    return Attention(out.to(out_dtype), lse)
