"""Send everything in one call. The baseline of every paper, and the right choice when the input fits.

Cost: one call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from agentctx.memory.errors import InputError
from agentctx.memory.types import Plan
from agentctx.workflows.answering import answer_input, answer_pieces, direct_plan, whole_pieces
from agentctx.workflows.conclude import Covered
from agentctx.workflows.frame import Graph, Strategy, add_node, whole_covered
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.state import State, TaskKind


@dataclass(frozen=True)
class Direct(Strategy):
    """Named explicitly, it also reads beyond the reliable window, but never beyond the context limit."""

    name: ClassVar[str] = "direct"
    kinds: ClassVar[tuple[TaskKind, ...]] = ("search",)

    def body_plan(self, scope: Scope) -> Plan:
        tokens, output = answer_input(scope, whole_pieces(scope))
        if tokens + output > scope.profile.context:
            raise InputError(
                f"the input has {tokens:,} tokens as one prompt, and {scope.profile.name} takes "
                f"{scope.profile.context - output:,}",
                code="too_large",
                hint="use --strategy auto",
            )
        return direct_plan(scope)

    def body(self, graph: Graph) -> str:
        add_node(graph, "read_all", _read_all)
        graph.add_edge("read_all", "verify")
        return "read_all"

    def covered(self, scope: Scope, state: State) -> Covered:
        return whole_covered(scope, state)


async def _read_all(run: RunContext, state: State) -> dict[str, Any]:
    return await answer_pieces(run, whole_pieces(run.scope))
