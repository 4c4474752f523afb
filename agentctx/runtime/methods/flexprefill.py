"""FlexPrefill: each head reads by the pattern of its last queries, as much as holds a share of its mass.

Lai et al., "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference",
arXiv 2502.20766. Where block means predict what the last 128 queries attend to (the root of the
Jensen-Shannon divergence is below tau), the pairs of blocks with the share gamma of the estimate are read;
elsewhere the columns and diagonals that hold gamma of what those queries attend to.

Ours: the pattern is found anew for each cell of an absolute grid, whose queries face all earlier keys; for KV
heads, not query heads; columns and diagonals are of blocks of 64, not of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from agentctx.kernels.lists import complete_lists
from agentctx.kernels.mass import attention_mass
from agentctx.kernels.records import Attention
from agentctx.memory.errors import ConfigError
from agentctx.memory.kv.pool import PAGE_TOKENS
from agentctx.runtime.layer import LayerKV
from agentctx.runtime.methods.prefill import BLOCK_Q, BlockPrefill, diagonal, estimate
from agentctx.runtime.methods.sparse import joined


@dataclass(frozen=True)
class FlexPrefill(BlockPrefill):
    """`budget` is the least that is read; `cell` the grid, in tokens."""

    name: ClassVar[str] = "flex"

    tau: float = 0.1
    gamma: float = 0.9
    cell: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cell < BLOCK_Q or self.cell % BLOCK_Q:
            raise ConfigError(f"flex: cell is {self.cell}", hint=f"a multiple of {BLOCK_Q}")
        if not 0 < self.gamma <= 1:
            raise ConfigError(f"flex: gamma is {self.gamma}", hint="within (0, 1]")

    @property
    def grid(self) -> int:
        return self.cell

    def part(self, q: Tensor, kv: LayerKV) -> Attention:
        start = kv.longest - q.shape[2]
        found = []
        for at in range(0, q.shape[2], self.cell):
            rows = q[:, :, at : at + self.cell]
            found.append(self._cell(rows, kv.upto(start + at + rows.shape[2])))
        return joined(found, 2)

    def _cell(self, q: Tensor, kv: LayerKV) -> Attention:
        before = diagonal(q, kv)
        shares = estimate(q, kv, before * PAGE_TOKENS - 1, BLOCK_Q)
        true, expected, slashes = _last_queries(q, kv)
        divergence = _jensen_shannon(true, expected).sqrt()
        flat = shares.flatten(2) / shares.shape[2]
        aware = _leading(flat, self.gamma).view_as(shares)
        patterned = self._crossing(true, slashes, before[0])
        mask = torch.where(divergence[..., None, None] < self.tau, aware, patterned)
        least = min(self.budget // PAGE_TOKENS, shares.shape[-1])
        mask = mask.scatter(-1, shares.topk(least, -1).indices, True)
        blocks, counts = complete_lists(
            *_lists(mask),
            kv.lens - q.shape[2],
            q.shape[2],
            block_q=BLOCK_Q,
            page_tokens=PAGE_TOKENS,
            sink_blocks=self.sink_blocks,
            local_blocks=self.local_blocks,
        )
        return self.attend_lists(q, kv, blocks, counts)

    def _crossing(self, columns: Tensor, slashes: Tensor, before: Tensor) -> Tensor:
        """Columns and, by distance, diagonals, `[1, H, NB]` each, as blocks of each run, `[1, H, M, NB]`."""
        column = _leading(columns, self.gamma)[:, :, None]
        slash = _leading(slashes, self.gamma)
        blocks = torch.arange(columns.shape[-1], device=columns.device)
        mask = column.expand(-1, -1, len(before), -1)
        for step in range(BLOCK_Q // PAGE_TOKENS):
            distance = before[:, None] + step - blocks
            inside = (distance >= 0) & (distance < len(blocks))
            mask = mask | (slash[:, :, distance.clamp(0, len(blocks) - 1)] & inside)
        return mask


def _last_queries(q: Tensor, kv: LayerKV) -> tuple[Tensor, Tensor, Tensor]:
    """For the last 128 rows shares of blocks, the same estimated, of distances: `[1, Hkv, NB]` each."""
    rows = min(BLOCK_Q, q.shape[2])
    last = q[:, :, -rows:]
    first = kv.longest - rows
    end = torch.full((1, 1), kv.longest - 1, dtype=torch.int32, device=q.device)
    expected = estimate(last, kv, end, rows)[:, :, 0]
    true, slashes = torch.zeros_like(expected), torch.zeros_like(expected)
    blocks = torch.arange(expected.shape[-1], device=q.device)
    for at in range(0, rows, PAGE_TOKENS):
        some = last[:, :, at : at + PAGE_TOKENS]
        stand = torch.arange(first + at, first + at + some.shape[2], dtype=torch.int32, device=q.device)[None]
        mass = _mass(some, kv, stand, len(blocks)) / rows
        true = true + mass
        away = int(stand[0, -1]) // PAGE_TOKENS - blocks
        slashes = slashes.index_add(-1, away.clamp_min(0), mass * (away >= 0))
    return true, expected, slashes


def _mass(q: Tensor, kv: LayerKV, stand: Tensor, blocks: int) -> Tensor:
    """Attention of all rows to each block, `[1, Hkv, blocks]`, the mean over the query heads of a group."""
    scoring = kv.scoring
    mass = attention_mass(
        q,
        kv.pages,
        kv.table,
        kv.lens,
        q_pos=stand,
        per="block",
        per_head=True,
        scale=scoring.scale,
        softcap=scoring.softcap,
    )
    grouped = mass.view(1, kv.pages.n_kv_heads, -1, mass.shape[-1]).mean(2)[..., :blocks]
    return torch.nn.functional.pad(grouped, (0, blocks - grouped.shape[-1]))


def _jensen_shannon(a: Tensor, b: Tensor) -> Tensor:
    """In nats, over the last axis."""
    middle = (a + b) / 2
    return ((torch.xlogy(a, a) + torch.xlogy(b, b)) / 2 - torch.xlogy(middle, middle)).sum(-1).clamp_min(0)


def _leading(shares: Tensor, gamma: float) -> Tensor:
    """The smallest set of the largest shares whose sum reaches `gamma` of all, as a mask."""
    ordered, order = shares.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = (before < gamma * ordered.sum(-1, keepdim=True)) & (ordered > 0)
    return torch.zeros_like(shares, dtype=torch.bool).scatter(-1, order, kept)


def _lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks that are set in a mask `[..., NB]`, in order, and how many."""
    counts = mask.sum(-1, dtype=torch.int32)
    blocks = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
    listed = torch.where(mask, blocks, mask.shape[-1]).sort(-1).values[..., : max(1, int(counts.max()))]
    return torch.where(listed < mask.shape[-1], listed, 0), counts
