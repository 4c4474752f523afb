"""Attention of several query blocks, each over keys of its own, and the union of two results."""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels.fallback.attend import attend

LOW = torch.finfo(torch.float32).min


def attend_rows(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Rows q `[n, R, D]` over k, v `[n, N, D]`, N > 0; `seen` bool, `[n, R or 1, N]`, or None for all.

    Returns out `[n, R, D]` and lse `[n, R]` float32; rows that see no key have out 0 and lse -inf.
    """
    rows = (q[:, None], k[:, None], v[:, None])
    # None stays None: a mask makes it slower.
    bias = None if seen is None else torch.where(seen, 0.0, -torch.inf)[:, None]
    out, lse = attend(*rows, bias, scale, softcap)
    return out[:, 0].float(), lse[:, 0]


def merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The attention over two disjoint sets of keys; the first out is overwritten."""
    lse = torch.logaddexp(a[1], b[1])
    base = lse.clamp_min(LOW)
    out = a[0].mul_(torch.exp(a[1] - base)[..., None])
    return out.addcmul_(b[0], torch.exp(b[1] - base)[..., None]), lse
