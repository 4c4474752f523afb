"""The union of attentions over disjoint keys, as it is defined."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from agentctx.kernels.records import Attention


def merge_lse(parts: Sequence[Attention], out_dtype: torch.dtype) -> Attention:
    lses = torch.stack([part.lse.double() for part in parts])
    outs = torch.stack([part.out.double() for part in parts])
    outs = torch.where(lses[..., None] == -torch.inf, 0.0, outs)
    lse = lses.logsumexp(0)
    weights = torch.exp(lses - lse.masked_fill(lse == -torch.inf, 0))
    return Attention((weights[..., None] * outs).sum(0).to(out_dtype), lse.float())
