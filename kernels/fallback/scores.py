"""Block scores by matrix products over the whole summary."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from agentctx.kernels.records import BlockSummary

CENTRES = (-1.510, -0.4528, 0.4528, 1.510)
THRESHOLD = 0.98


def block_scores(
    q: Tensor,
    summary: BlockSummary,
    context_lens: Tensor,
    q_pos: Tensor | None,
    group: str,
    per_head: bool,
    estimate: str,
    scale: float,
) -> Tensor:
    batch, heads, rows, size = q.shape
    kv_heads, page = summary.data.shape[1], summary.page_tokens
    x = q.float().reshape(batch, kv_heads, heads // kv_heads * rows, size)
    found, step = _entries(x, summary, estimate, scale)
    found = found.view(batch, kv_heads, heads // kv_heads, rows, found.shape[-1])
    capacity = found.shape[-1] * step // page
    if outside(context_lens, 0, capacity * page):
        raise IndexError(
            f"context_lens is {context_lens.tolist()}: the summary holds {capacity * page} tokens"
        )
    limit = context_lens[:, None] if q_pos is None else context_lens[:, None].minimum(q_pos + 1)
    starts = torch.arange(0, found.shape[-1] * step, step, dtype=torch.int32, device=q.device)
    hidden = (starts >= limit[..., None])[:, None, None]  # [B, 1, 1, T or 1, E]
    found = found.masked_fill(hidden, float("-inf"))
    if summary.kind == "submeans":
        # The run before a block reaches into it, but counts only if the block itself does.
        per = page // step
        found = pad(found, (1, 0), value=float("-inf")).unfold(-1, per + 1, per).amax(-1)
        found = found.masked_fill(hidden[..., ::per], float("-inf"))
    elif page > step:
        found = found.view(*found.shape[:-1], capacity, page).amax(-1)
    if per_head:
        return found.flatten(1, 2)
    if group == "max":
        return found.amax(2)
    return found.mean(2) if group == "mean" else found.sum(2)


def outside(x: Tensor, low: int, high: int) -> bool:
    """Whether any of x is below `low` or above `high`."""
    if not x.numel():
        return False
    least, most = torch.aminmax(x)
    return int(least) < low or int(most) > high


def _entries(x: Tensor, summary: BlockSummary, estimate: str, scale: float) -> tuple[Tensor, int]:
    """Scores `[B, Hkv, G T, E]` of what a summary holds, and the tokens from one entry to the next."""
    data = summary.data
    if summary.kind == "minmax":
        columns = data.float().flatten(3).transpose(2, 3) if data.dim() == 5 else data
        y = x * scale
        return torch.cat([y.clamp_min(0), y.clamp_max(0)], -1) @ columns, summary.page_tokens
    if summary.kind in ("mean", "submeans"):
        return (x * scale) @ data.float().transpose(
            2, 3
        ), 16 if summary.kind == "submeans" else summary.page_tokens
    rotated = _rotate(x)
    codes = torch.cat([(data >> (2 * part)) & 3 for part in range(4)], -1)
    if estimate == "manhattan":
        t = THRESHOLD * x.square().mean(-1, keepdim=True).sqrt()
        own = (rotated > -t).float() + (rotated > 0).float() + (rotated > t).float()
        return -torch.cdist(own, codes.float(), p=1.0), 1
    assert summary.scale is not None
    sigma = summary.scale.view(-1, 1, 1) / THRESHOLD
    levels = torch.tensor(CENTRES, device=x.device)[codes.long()]
    return (rotated * (sigma * scale)) @ levels.transpose(2, 3), 1


def _rotate(x: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of the last dimension, in Sylvester's order."""
    shape, step = x.shape, 1
    while step < shape[-1]:
        even, odd = x.reshape(*shape[:-1], -1, 2, step).unbind(-2)
        x = torch.stack([even + odd, even - odd], -2)
        step *= 2
    unit: float = shape[-1] ** -0.5
    return x.reshape(shape) * unit


def pool_queries(q: Tensor, block_q: int) -> Tensor:
    batch, heads, rows, size = q.shape
    whole = rows // block_q * block_q
    runs = q[:, :, :whole].reshape(batch, heads, rows // block_q, block_q, size)
    pooled = runs.mean(3, dtype=torch.float32)
    if whole == rows:
        return pooled
    return torch.cat([pooled, q[:, :, whole:].mean(2, keepdim=True, dtype=torch.float32)], 2)
