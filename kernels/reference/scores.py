"""Block scores as they are defined, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels.records import BlockSummary

CENTRES = (-1.510, -0.4528, 0.4528, 1.510)  # means of a unit Gaussian in the cells cut at -0.98, 0, 0.98
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
    x = q.double().reshape(batch, kv_heads, heads // kv_heads, rows, size)
    found, step, tokens = _entries(x, summary, estimate, scale)
    starts = torch.arange(found.shape[-1]) * step
    capacity = len(starts) * step // page
    limit = context_lens[:, None].expand(batch, rows)
    if q_pos is not None:
        limit = limit.minimum(q_pos + 1)
    if bool(((context_lens < 0) | (context_lens > capacity * page)).any()):
        raise IndexError(f"context_lens: the summary holds {capacity * page} tokens")
    out = torch.full((batch, kv_heads, heads // kv_heads, rows, capacity), float("-inf"), dtype=torch.float64)
    for b in range(batch):
        for t in range(rows):
            for block in range(capacity):
                touches = (starts < (block + 1) * page) & (starts + tokens > block * page)
                counts = touches & (starts < limit[b, t])
                if block * page < limit[b, t]:
                    out[b, :, :, t, block] = found[b, :, :, t, counts].amax(-1)
    if per_head:
        return out.flatten(1, 2).float()
    reduced = {"max": out.amax(2), "mean": out.mean(2), "sum": out.sum(2)}
    return reduced[group].float()


def _entries(x: Tensor, summary: BlockSummary, estimate: str, scale: float) -> tuple[Tensor, int, int]:
    """Scores `[B, Hkv, G, T, E]` of what a summary holds; entry e covers `tokens` from `e step` on."""
    data, page, size = summary.data, summary.page_tokens, x.shape[-1]
    if summary.kind == "minmax":
        if data.dim() == 5:
            high, low = data.double().unbind(3)
        else:
            high, low = data.double().transpose(2, 3).split_with_sizes([size, size], 3)
        y = x.unsqueeze(4) * scale
        found = torch.maximum(y * high[:, :, None, None], y * low[:, :, None, None]).sum(-1)
        return found, page, page
    if summary.kind in ("mean", "submeans"):
        found = torch.einsum("bhgtd,bhed->bhgte", x * scale, data.double())
        return (found, page, page) if summary.kind == "mean" else (found, 16, 32)
    rotated = x @ _rotation(size)
    codes = torch.cat([(data >> (2 * part)) & 3 for part in range(4)], -1).double()
    if estimate == "manhattan":
        t = THRESHOLD * x.square().mean(-1, keepdim=True).sqrt()
        own = (rotated > -t).double() + (rotated > 0).double() + (rotated > t).double()
        distance = (own.unsqueeze(4) - codes[:, :, None, None]).abs().sum(-1)
        return -distance, 1, 1
    assert summary.scale is not None
    sigma = summary.scale.double()[:, None, None] / THRESHOLD
    levels = torch.tensor(CENTRES, dtype=torch.float64)[codes.long()] * sigma
    return torch.einsum("bhgtd,bhed->bhgte", rotated * scale, levels), 1, 1


def _rotation(size: int) -> Tensor:
    """The orthonormal Walsh-Hadamard matrix, in Sylvester's order."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    root: float = size**0.5
    return matrix / root


def pool_queries(q: Tensor, block_q: int) -> Tensor:
    runs = [q[:, :, start : start + block_q].double().mean(2) for start in range(0, q.shape[2], block_q)]
    empty = q.new_zeros((*q.shape[:2], 0, q.shape[3]), dtype=torch.float32)
    return torch.stack(runs, 2).float() if runs else empty
