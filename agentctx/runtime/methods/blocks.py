"""Questions and answers over the blocks that score best: what quest, mean, adamas and random share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from agentctx.kernels.decode import sparse_decode
from agentctx.kernels.prefill import token_sparse_prefill
from agentctx.kernels.records import Attention, BlockSelection
from agentctx.kernels.scores import block_scores
from agentctx.kernels.selection import resolve_pages, select_blocks, topk_blocks
from agentctx.memory.errors import ConfigError
from agentctx.memory.kv.pool import PAGE_TOKENS
from agentctx.runtime.guard import bracket, limit_of
from agentctx.runtime.layer import LayerKV
from agentctx.runtime.methods.sparse import Sparse, positions


@dataclass(frozen=True)
class BestBlocks(Sparse):
    """Each row reads `budget` tokens in whole blocks: the first, the last, its own, and the best.

    Dense in the first `dense_layers` layers and for the first `dense_below` tokens. `guard`: "" for none,
    "report" to bracket what is left out (see `runtime.guard`), "certified:EPS" to attend densely wherever it
    may exceed the share EPS.
    """

    while_asking: ClassVar[bool] = True
    summary: ClassVar[str] = ""  # whose scores rank the blocks, the highest of a group of query heads

    budget: int = 1024
    dense_layers: int = 2
    dense_below: int = 2048
    sink_blocks: int = 1
    local_blocks: int = 4
    guard: str = ""

    def __post_init__(self) -> None:
        least = (self.sink_blocks + self.local_blocks + 2) * PAGE_TOKENS
        if min(self.dense_layers, self.dense_below, self.sink_blocks, self.local_blocks) < 0:
            raise ConfigError(f"a parameter of {self.name} is below 0: {self}")
        if self.budget < least:
            raise ConfigError(
                f"a budget of {self.budget} tokens is too small for {self.name}", hint=f"at least {least}"
            )
        limit_of(self.guard)

    @property
    def limit(self) -> int:
        return max(self.dense_below, self.budget)

    @property
    def joins(self) -> bool:
        return super().joins and not self.guard  # a bracket is a share of all that is seen

    @property
    def free_blocks(self) -> int:
        """Blocks of a row's choice that are not forced: as many can be pinned."""
        return self.budget // PAGE_TOKENS - self.sink_blocks - self.local_blocks - 1

    def serves(self, kv: LayerKV) -> bool:
        return super().serves(kv) and kv.index >= self.dense_layers

    def scores(self, q: Tensor, kv: LayerKV) -> Tensor:
        """How much each row wants of each block, float32 `[1, Hkv, T, NB]`."""
        at, scale = positions(q, kv), kv.scoring.scale
        return block_scores(q, kv.summary(self.summary), kv.lens, q_pos=at, scale=scale)

    def choose(self, q: Tensor, kv: LayerKV) -> BlockSelection:
        """A list for each KV head and row, `[1, Hkv, T, S]`."""
        if q.shape[2] == 1 and self.summary and not kv.notes[0].pins:
            one = select_blocks(
                q,
                kv.summary(self.summary),
                kv.table,
                kv.lens,
                self.budget // PAGE_TOKENS,
                sink_blocks=self.sink_blocks,
                local_blocks=self.local_blocks + 1,
                scale=kv.scoring.scale,
            )
            return BlockSelection(*(x.unsqueeze(2) for x in one))
        rows, scores = positions(q, kv), self.scores(q, kv)
        if pins := kv.notes[0].pins:
            pinned = torch.tensor(pins, device=scores.device)
            scores = scores.index_fill(-1, pinned, torch.finfo(scores.dtype).max)
        blocks, counts = topk_blocks(
            scores,
            torch.div(rows, PAGE_TOKENS, rounding_mode="floor") + 1,
            self.budget // PAGE_TOKENS,
            sink_blocks=self.sink_blocks,
            local_blocks=self.local_blocks + 1,  # and the row's own
        )
        return resolve_pages(blocks, counts, kv.table)

    def part(self, q: Tensor, kv: LayerKV) -> Attention:
        chosen = self.choose(q, kv)
        scale, softcap = kv.scoring.scale, kv.scoring.softcap
        if q.shape[2] == 1:
            one = BlockSelection(*(x.squeeze(2) for x in chosen))
            found = sparse_decode(q, kv.pages, one, kv.lens, scale=scale, softcap=softcap)
        else:
            found = token_sparse_prefill(q, kv.pages, chosen, kv.lens, scale=scale, softcap=softcap)
        return self._guarded(q, kv, chosen, found) if self.guard else found

    def _guarded(self, q: Tensor, kv: LayerKV, chosen: BlockSelection, found: Attention) -> Attention:
        low, high = bracket(q, kv, chosen, found.lse)
        most = limit_of(self.guard)
        breach = high > most
        kv.notes[0].coverage.add(low, high, int(breach.sum()))
        if not bool(breach.any()):
            return found
        exact = kv.exact(q)
        return Attention(
            torch.where(breach[..., None], exact.out, found.out), torch.where(breach, exact.lse, found.lse)
        )
