"""An indexed memory of experience: what leaves the context is archived, listed, and recalled word for word.

Memex(RL), "Memex(RL): Scaling Long-Horizon LLM Agents via Indexed Experience Memory", arXiv 2603.04257, keeps
summaries and indices in the context and full interactions in a store, dereferenced by id. There the model
decides what to save, and the rest is lost. Ours archives everything: the model may shelve an entry under a
title of its own, and when the context is full code shelves the oldest. Cost: one call a step, and an answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from agentctx.workflows.run import RunContext
from agentctx.workflows.strategies.acting import Acting, ActState
from agentctx.workflows.worklog import WorkLog


@dataclass(frozen=True)
class Experience(Acting):
    """Entries are shelved from four fifths of the context on, so that a result always finds room."""

    name: ClassVar[str] = "experience"
    steps: int = 50

    def tools(self) -> tuple[str, ...]:
        return ("find", "grep", "read", "archive", "recall", "search_archive")

    async def compact(self, run: RunContext, log: WorkLog, state: ActState) -> dict[str, Any]:
        while log.live and self.prompt_tokens(run.scope, log) > self.limit(run.scope) * 4 // 5:
            log.archive(log.live[0].id)
        return {}
