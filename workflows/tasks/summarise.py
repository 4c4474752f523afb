"""Summarise: note the main points of every chunk, then merge the notes part by part in a tree.

Calls after the reads: R, the merges of the trees over each part's reads (`workflows.cost`).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, ClassVar

from agentctx.memory.types import Stage
from agentctx.workflows import cost
from agentctx.workflows.cut import Cut
from agentctx.workflows.notes import merge_level, outline, side_by_side
from agentctx.workflows.profile import Tier
from agentctx.workflows.roles import GIST, MERGE, SUMMARISE, Role
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.state import State
from agentctx.workflows.tasks.pipeline import Pipeline

MOST = 64  # results in one merge


@dataclass(frozen=True)
class Summarise(Pipeline):
    """A model that only reads gives a sentence for each chunk; code keeps the most central ones."""

    needs: ClassVar[Tier] = "reads"

    def read_role(self, scope: Scope) -> Role:
        return scope.role(SUMMARISE if scope.profile.writes else GIST)

    def stages(self, scope: Scope, made: Cut) -> list[Stage]:
        merges = sum(self._levels(scope, made))
        role = scope.role(MERGE)
        room = scope.profile.window - role.max_output
        return [cost.stage("merge", role.name, [room] * merges, role.max_output, scope.profile)]

    def visits(self, scope: Scope, made: Cut) -> int:
        return 1 + len(self._levels(scope, made))

    async def finish(self, run: RunContext, state: State, made: Cut) -> dict[str, Any]:
        """One level of the trees, all parts at once; at the top the parts' points become the draft."""
        done = state.get("reads", {})
        groups = state["groups"] if "groups" in state else _by_part(made, done)
        lost = state.get("not_forwarded", 0)
        update: dict[str, Any] = {}
        if run.scope.profile.writes and any(len(group) > 1 for group in groups):
            fan_in = merge_width(run.scope, self.fan_in)
            merged = await asyncio.gather(*(merge_level(run, group, fan_in) for group in groups))
            groups = [one.records for one in merged]
            level = side_by_side(merged)
            lost += level.left_out
            update = {"groups": groups, "not_forwarded": lost, "failures": level.failures}
            if any(len(group) > 1 for group in groups):
                return {**update, "route": "finish"}
        draft, left_out = await asyncio.to_thread(outline, run, made, groups, done)
        return {**update, "groups": groups, "draft": draft, "not_forwarded": lost + left_out}

    def _levels(self, scope: Scope, made: Cut) -> list[int]:
        """Merges by level, all parts together; a model that does not write merges nothing."""
        levels: list[int] = []
        if not scope.profile.writes:
            return levels
        fan_in = merge_width(scope, self.fan_in)
        for part in range(len(made.parts)):
            mine = cost.tree(sum(read.part == part for read in made.reads), fan_in).levels
            levels += [0] * (len(mine) - len(levels))
            for depth, count in enumerate(mine):
                levels[depth] += count
        return levels


def merge_width(scope: Scope, fan_in: int | None) -> int:
    """How many summaries fit one merge, each taken at its cap."""
    merge, record = scope.role(MERGE), scope.role(SUMMARISE).max_output
    empty = scope.prompt_tokens(merge.render(scope.task.question, [("notes 10", "")], scope.tag))
    label = empty - scope.prompt_tokens(merge.render(scope.task.question, [], scope.tag))
    room = scope.profile.window - merge.max_output - empty
    return min(fan_in or MOST, room // (record + label))


def _by_part(made: Cut, done: dict[str, str]) -> list[list[str]]:
    """The records of the reads that succeeded, by part, in reading order."""
    groups: list[list[str]] = [[] for _ in made.parts]
    for number, read in enumerate(made.reads):
        if str(number) in done:
            groups[read.part].append(done[str(number)])
    return groups
