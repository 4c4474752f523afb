"""Choose a strategy by rules that can be read, and say why.

1. The input fits the reliable window: one direct call (the frame of every strategy does this).
2. Anything but a question about a part: `recursive`, because full coverage is the point.
3. A question, and all passages are indexed as they are now: `kv_retrieval`.
4. A question, and the model can score text without generating: `spans`.
5. A question otherwise: `recursive` search, which reads everything.
A choice the budget cannot pay is dropped; `lexical` is left then, the best coverage per token, and the run is
announced as partial coverage.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime

from agentctx.memory.types import Plan
from agentctx.workflows.conclude import Covered
from agentctx.workflows.cost import without_retries
from agentctx.workflows.frame import Graph, Strategy, reads_directly
from agentctx.workflows.run import RunContext, fits
from agentctx.workflows.scope import Scope
from agentctx.workflows.state import Input, Output, State, TaskKind
from agentctx.workflows.strategies.direct import Direct
from agentctx.workflows.strategies.kv_retrieval import KVRetrieval, warn_stale
from agentctx.workflows.strategies.lexical import Lexical
from agentctx.workflows.strategies.recursive import Recursive
from agentctx.workflows.strategies.spans import Spans
from agentctx.workflows.tasks.table import KINDS

KV = KVRetrieval()
CANDIDATES: dict[str, Strategy] = {
    "direct": Direct(),
    "kv_retrieval": KV,
    "spans": Spans(),
    "recursive": Recursive(),
    "lexical": Lexical(),
}


@dataclass(frozen=True, slots=True)
class Decision:
    """The choice, why, and what else was possible."""

    choice: str
    reason: str
    alternatives: tuple[str, ...] = ()


def decide(scope: Scope) -> Decision:
    """Apply the rules; free of model calls."""
    return scope.keep("decision", lambda: _decide(scope))


def _decide(scope: Scope) -> Decision:
    if reads_directly(scope):
        return Decision("direct", "the input fits the window that the model reads reliably")
    if scope.task.kind != "search":
        return Decision("recursive", f"the task {scope.task.kind} needs full coverage")
    if (indexed := KV.indexed(scope)) and all(indexed):
        first, reason = "kv_retrieval", "all passages are indexed: none is read again"
    elif scope.reader:
        first, reason = "spans", "the local model ranks passages without generating"
    else:
        first, reason = "recursive", "without a local reader, every part is read by a call"
    plan = CANDIDATES[first].plan(scope)
    second = "lexical"
    alternatives = (f"{second}: at most {_calls(CANDIDATES[second].plan(scope))}",)
    if fits(scope.budget, without_retries(plan)):
        return Decision(first, reason, alternatives)
    refused = f"{first} needs up to {_calls(plan)}, more than the budget; passages were chosen by words alone"
    return Decision(second, refused, (f"{first}: at most {_calls(plan)}",))


def _calls(plan: Plan) -> str:
    return f"{plan.ceiling.calls:,} calls and {plan.ceiling.input_tokens:,} input tokens"


@dataclass(frozen=True)
class Auto(Strategy):
    """The chosen strategy runs as a subgraph, under the plan that was announced for it."""

    name: ClassVar[str] = "auto"
    kinds: ClassVar[tuple[TaskKind, ...]] = tuple(KINDS)
    depth: ClassVar[int] = 1

    def chosen(self, scope: Scope) -> Strategy:
        return CANDIDATES[decide(scope).choice]

    def body_plan(self, scope: Scope) -> Plan:
        decision = decide(scope)
        plan = self.chosen(scope).plan(scope)
        return replace(
            plan,
            supersteps=plan.supersteps + 4,
            assumptions=(f"auto chose {decision.choice}: {decision.reason}", *plan.assumptions),
            alternatives=(*decision.alternatives, "force one with --strategy"),
        )

    def salvage(self, run: RunContext, state: State) -> list[list[Any]]:
        return self.chosen(run.scope).salvage(run, state)

    def covered(self, scope: Scope, state: State) -> Covered:
        return self.chosen(scope).covered(scope, state)

    def body(self, graph: Graph) -> str:
        for name, candidate in CANDIDATES.items():
            graph.add_node(name, candidate.graph().compile())
            graph.add_edge(name, END)
        return "choose"

    def graph(self) -> Graph:
        graph: Graph = StateGraph(State, RunContext, input_schema=Input, output_schema=Output)
        graph.add_node("choose", _choose)
        graph.add_edge(START, "choose")
        graph.add_conditional_edges("choose", lambda state: state["route"], list(CANDIDATES))
        self.body(graph)
        return graph


async def _choose(state: State, runtime: Runtime[RunContext]) -> dict[str, Any]:
    run = runtime.context
    with run.trace.span("choose"):
        decision = decide(run.scope)
        if run.scope.task.kind == "search" and decision.choice != "direct":
            indexed = KV.indexed(run.scope)
            if any(indexed):  # else these are other documents
                warn_stale(run, indexed)
        run.trace.emit("decision", choice=decision.choice, reason=decision.reason)
        return {"route": decision.choice}
