"""What is kept beside the pages of a sequence: summaries of its blocks, and what a guard saw."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from agentctx.kernels.records import BlockSummary, KVPages
from agentctx.kernels.summary import build_summary
from agentctx.memory.kv.pool import PAGE_TOKENS

SAMPLE = 512  # tokens whose keys set the thresholds of codes, which so do not depend on when they are made


@dataclass(frozen=True, slots=True)
class Summarised:
    """A summary and how many tokens it covers."""

    summary: BlockSummary
    tokens: int


@dataclass(slots=True)
class Coverage:
    """How much of the attention was left out, over all rows and heads that were bracketed."""

    rows: int = 0
    low: float = 0.0  # sums over the rows
    high: float = 0.0
    worst: float = 0.0
    fallbacks: int = 0  # rows that were attended densely after all

    def add(self, low: Tensor, high: Tensor, fallbacks: int = 0) -> None:
        """Count dropped masses between `low` and `high`, of one shape."""
        self.rows += low.numel()
        self.low += float(low.sum())
        self.high += float(high.sum())
        self.worst = max(self.worst, float(high.max()))
        self.fallbacks += fallbacks

    def told(self) -> dict[str, float]:
        """For a reply: `low` and `high` bound the mean share that a row and head left out, `worst` is the
        highest upper bound of any. Of an empty one, rows 0.
        """
        rows = max(1, self.rows)
        return {
            "rows": self.rows,
            "low": self.low / rows,
            "high": self.high / rows,
            "worst": self.worst,
            "fallbacks": self.fallbacks,
        }


@dataclass(slots=True)
class Notes:
    """Of one sequence, by layer and kind."""

    summaries: dict[tuple[int, str], Summarised] = field(default_factory=dict)
    coverage: Coverage = field(default_factory=Coverage)
    pins: tuple[int, ...] = ()  # blocks that methods which choose blocks always read

    def summary(
        self,
        layer: int,
        kind: str,
        pages: KVPages,
        table: Tensor,
        lens: Tensor,
        tokens: int,
        unsettled: int = 0,
    ) -> BlockSummary:
        """A summary of the first `tokens`, brought up to date from the last block that it covers.

        `table [1, NB]`, `lens [1]` (`tokens`). The last
        `unsettled` of them may still change. Two-bit codes need `SAMPLE` tokens to be the same always.
        """
        held = self.summaries.get((layer, kind))
        covered, before = (0, None) if held is None else (min(held.tokens, tokens), held.summary)
        if before is None and kind == "hadamard2":
            before = build_summary(pages, table, lens.clamp_max(SAMPLE), kind)
        found = build_summary(pages, table, lens, kind, first_block=covered // PAGE_TOKENS, out=before)
        self.summaries[layer, kind] = Summarised(found, max(0, tokens - unsettled))
        return found

    def crop(self, tokens: int) -> None:
        """Only the first `tokens` are still what they were."""
        if tokens < SAMPLE:
            self.summaries.clear()
        for key, held in self.summaries.items():
            self.summaries[key] = Summarised(held.summary, min(held.tokens, tokens))

    def copy(self) -> Notes:
        """For a second sequence with the same past. Summaries, a few per cent of the pages, are copied."""
        return Notes(
            {
                key: Summarised(replace(held.summary, data=held.summary.data.clone()), held.tokens)
                for key, held in self.summaries.items()
            },
            pins=self.pins,
        )
