"""Multi-hop: search twice; the second time every read is shown what the first found.

A fact that only makes sense beside another, found elsewhere, is noted in the second pass. Calls after the
first reads: L again, and at most ⌈log₂ L⌉ + 1 answers.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from agentctx.memory.types import Failure, Stage
from agentctx.workflows import cost
from agentctx.workflows.call import ask
from agentctx.workflows.cut import Cut
from agentctx.workflows.findings import LABEL, findings, room_for
from agentctx.workflows.notes import best_first, notes_of
from agentctx.workflows.roles import READ, Role
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.state import Record, State
from agentctx.workflows.tasks.pipeline import Pipeline
from agentctx.workflows.tasks.search import answer_doubling, doubling_stage

FINDINGS = 320  # tokens of what the first pass found, shown to each read of the second


@dataclass(frozen=True)
class MultiHop(Pipeline):
    """Findings are words of the sources, so they are shown between delimiters like any text."""

    spare: ClassVar[int] = room_for(FINDINGS)

    def read_role(self, scope: Scope) -> Role:
        return scope.role(READ)

    def stages(self, scope: Scope, made: Cut) -> list[Stage]:
        role = self.read_role(scope)
        inputs = [read.input_tokens + self.spare for read in made.reads]
        again = cost.stage("read again", role.name, inputs, role.max_output, scope.profile)
        return [again, doubling_stage(scope, len(made.reads))]

    async def finish(self, run: RunContext, state: State, made: Cut) -> dict[str, Any]:
        first = best_first(await asyncio.to_thread(notes_of, run, made, state.get("reads", {})))
        if not first:
            return await answer_doubling(run, first)
        found = findings(run.scope, self.read_role(run.scope), first, FINDINGS)
        results = await asyncio.gather(*(self._again(run, made, n, found) for n in range(len(made.reads))))
        reads = {str(n): r.id for n, r in enumerate(results) if isinstance(r, Record)}
        failed = [result for result in results if isinstance(result, Failure)]
        second = await asyncio.to_thread(notes_of, run, made, reads)
        update = await answer_doubling(run, best_first([*second, *first]))
        if failed:
            update["failures"] = {**update.get("failures", {}), "second": asdict(failed[0])}
        return update

    async def _again(self, run: RunContext, made: Cut, number: int, found: str) -> Record | Failure:
        pieces = [(LABEL, found), *made.pieces(run.scope, made.reads[number])]
        return await ask(run, self.read_role(run.scope), run.scope.task.question, pieces, finishing=True)
