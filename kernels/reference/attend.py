"""Softmax attention of rows over keys, some of them hidden: the definition that every reference shares."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float = 0.0,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows q `[T, D]` over keys k, v `[N, D]`, all float64; `visible [T, N]`; `bias [N]` is added.

    Returns out `[T, D]` and lse `[T]`; a row that sees no key has out 0 and lse -inf.
    """
    scores = scale * (q @ k.T)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[:, None])
    return weights @ v, lse
