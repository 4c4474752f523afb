"""What a reading holds, token by token: its texts, and which of their tokens an answer sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agentctx.memory.errors import ConfigError
from agentctx.memory.kv.pool import PAGE_TOKENS
from agentctx.reading.records import Coverage
from agentctx.reading.request import Focus, Place
from agentctx.reading.texts import Text, located
from agentctx.runtime.methods.blocks import BestBlocks
from agentctx.runtime.methods.dense import Dense
from agentctx.runtime.methods.sparse import Sparse

SINKS = 4  # first tokens that are always seen where nothing stands before the text (arXiv 2309.17453)


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """`ids` of the tokens held, and which of them are used, bool `kept` of the same length."""

    ids: Sequence[int]
    kept: Tensor
    texts: tuple[Text, ...]

    def seen(self, focus: Focus) -> Tensor:
        """Which tokens an answer sees, bool like `kept`."""
        seen = self.kept.clone()
        if focus.attend_only is not None:
            seen = self.kept & self._marked(focus.attend_only)
        seen &= ~self._marked(focus.drop)
        seen[: self.texts[0].first or SINKS] = True
        return seen

    def coverage(self, seen: Tensor) -> Coverage:
        """In tokens of the texts, prompt around them not counted."""
        total = sum(len(text.offsets) for text in self.texts)
        within = torch.zeros_like(self.kept)
        for text in self.texts:
            within[text.first : text.first + len(text.offsets)] = True
        return Coverage(total, int((self.kept & within).sum()), int((seen & within).sum()))

    def pins(self, places: Sequence[Place], method: Dense, seen: Tensor | None = None) -> tuple[int, ...]:
        """The blocks that a method must read for these places, none if it reads everything anyway.

        `seen`: the tokens that were read anew, without the others. Raises ConfigError for a method that
        cannot be told what to read, and for more than fits its budget.
        """
        marked = self._marked(places)
        if not isinstance(method, Sparse) or not method.while_asking or not bool(marked.any()):
            return ()
        if not isinstance(method, BestBlocks):
            raise ConfigError(
                f"{method.name} does not choose what it reads, so nothing can be pinned",
                hint="choose quest, mean or adamas",
            )
        index = (marked if seen is None else marked[seen]).nonzero()[:, 0]
        found = torch.unique(index // PAGE_TOKENS).tolist()
        if len(found) > method.free_blocks:
            raise ConfigError(
                f"{len(found)} blocks of {PAGE_TOKENS} tokens are pinned, {method.free_blocks} can be",
                hint=f"pin less, or raise the budget of {method.budget}",
            )
        return tuple(found)

    def _marked(self, places: Sequence[Place]) -> Tensor:
        marked = torch.zeros_like(self.kept)
        for found in located(self.texts, places):
            marked[found.start : found.stop] = True
        return marked
