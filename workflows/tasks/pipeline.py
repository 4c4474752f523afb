"""What a map-reduce reads for, and what it makes of the notes: one pipeline for each kind of task.

    cut -> read ×L -> gather -> finish … -> verify

Every read is an independent call with the pipeline's role. `finish` combines what they returned by the
combinators of `workflows.combine`, with calls of its own only where its plan says so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from agentctx.memory.types import Stage
from agentctx.workflows.cut import Cut
from agentctx.workflows.notes import best_first, notes_of, spans_of
from agentctx.workflows.profile import Tier
from agentctx.workflows.roles import Role
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.state import State

SHOWN = 3  # notes whose quotes are shown when no answer could be made of them


@dataclass(frozen=True)
class Pipeline(ABC):
    """`fan_in`: most results that one merge takes; `max_pairs`: most pairs that are compared."""

    needs: ClassVar[Tier] = "writes"  # JSON and copied quotes
    spare: ClassVar[int] = 0  # tokens that reads leave free for what is added to them later

    fan_in: int | None = None
    max_pairs: int = 200

    @abstractmethod
    def read_role(self, scope: Scope) -> Role:
        """The role of the reads."""

    @abstractmethod
    def stages(self, scope: Scope, made: Cut) -> list[Stage]:
        """What the calls after the reads cost at most."""

    @abstractmethod
    async def finish(self, run: RunContext, state: State, made: Cut) -> dict[str, Any]:
        """Combine the reads; an update with `route` "finish" asks to be called once more."""

    def question(self, scope: Scope) -> str:
        """What the reads are asked. Raises ConfigError for a task that cannot be done as it stands."""
        return scope.task.question

    def visits(self, scope: Scope, made: Cut) -> int:
        """How often `finish` is called at most."""
        return 1

    def salvage(self, run: RunContext, state: State, made: Cut) -> list[list[Any]]:
        """Evidence that the reads have found so far, best first."""
        return spans_of(best_first(notes_of(run, made, state.get("reads", {})))[:SHOWN])
