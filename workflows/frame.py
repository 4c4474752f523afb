"""The frame that every strategy shares: plan, answer directly if the input fits, else the body; then verify.

    START -> plan -> direct -> verify -> END
                 \\-> body … -> verify

A strategy is a frozen dataclass whose fields are its parameters. It says what it will cost (`body_plan`) and
adds the nodes of its body (`body`); the frame does the rest, so no strategy can skip the plan or the check.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any, ClassVar

from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime

from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Budget, Plan
from agentctx.workflows.answering import answer_input, answer_pieces, direct_plan, whole_pieces
from agentctx.workflows.conclude import Covered, conclude
from agentctx.workflows.profile import Tier
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.split import LEAST
from agentctx.workflows.state import Input, Output, State, TaskKind

Graph = StateGraph[State, RunContext, Input, Output]
Step = Callable[[RunContext, Any], Awaitable[dict[str, Any]]]  # of the strategy's own state


class Strategy(ABC):
    """A named way to answer. `graph()` is an ordinary, uncompiled LangGraph graph."""

    kinds: ClassVar[tuple[TaskKind, ...]] = ("search", "summarise")  # tasks it can do
    gives_way: ClassVar[bool] = True  # to one direct call, where the input fits that

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is called."""

    @property
    def state(self) -> type[State]:
        """Of its graph; a strategy with keys of its own extends it."""
        return State

    @property
    def listed(self) -> str:
        """Its name in the registry, by which it is made again."""
        return self.name

    @property
    def depth(self) -> int:
        """Levels of strategies inside this one."""
        return 0

    @abstractmethod
    def body_plan(self, scope: Scope) -> Plan:
        """What the body costs at most on this scope."""

    @abstractmethod
    def body(self, graph: Graph) -> str:
        """Add the body's nodes and edges to `graph`, the last leading to `verify`; return the entry node."""

    @abstractmethod
    def covered(self, scope: Scope, state: State) -> Covered:
        """What the body read, by the chunks it works on."""

    def needs(self, scope: Scope) -> Tier:
        """What the model must be able to do for this to be worth its cost; below it a run says so."""
        return "reads"

    def direct(self, scope: Scope) -> bool:
        """True if one call over everything takes the place of the body."""
        return self.gives_way and reads_directly(scope)

    def chosen(self, scope: Scope) -> Strategy:
        """The strategy that does the work; another one, where this one only chooses."""
        return self

    def allowed(self, budget: Budget) -> Budget:
        """What a run may cost that was allowed `budget`."""
        return budget

    def salvage(self, run: RunContext, state: State) -> list[list[Any]]:
        """Evidence that a cancelled run has found, best first, without a further call."""
        return state.get("spans", [])

    def plan(self, scope: Scope) -> Plan:
        """The ceiling of a run: that of one direct call if the input fits the reliable window."""
        if not scope.documents:
            raise ConfigError("there is nothing to read: no document was opened")
        if scope.task.kind not in self.kinds:
            raise ConfigError(
                f"{self.name} does not do the task {scope.task.kind}, only {', '.join(self.kinds)}",
                hint="use --strategy recursive, or auto",
            )
        _check_question(scope)
        if scope.budget.depth is not None and self.depth > scope.budget.depth:
            raise ConfigError(
                f"{self.name} runs another strategy inside; the budget allows depth {scope.budget.depth}",
                hint="name a strategy instead, or raise --max-depth",
            )
        if self.direct(scope):
            return direct_plan(scope)
        return self.body_plan(scope)

    def graph(self) -> Graph:
        """The whole graph, uncompiled; its runs take a `RunContext` as context."""
        graph: Graph = StateGraph(self.state, RunContext, input_schema=Input, output_schema=Output)
        add_node(graph, "plan", self._plan)
        add_node(graph, "direct", _direct)
        add_node(graph, "verify", self._verify)
        entry = self.body(graph)
        graph.add_edge(START, "plan")
        graph.add_conditional_edges("plan", _route(entry), {"direct": "direct", entry: entry})
        graph.add_edge("direct", "verify")
        graph.add_edge("verify", END)
        return graph

    async def _plan(self, run: RunContext, state: State) -> dict[str, Any]:
        run.trace.emit("plan.made", plan=asdict(run.plan))
        if self.direct(run.scope):
            return {"route": "direct"}
        profile, needed = run.scope.profile, self.needs(run.scope)
        if needed not in profile.tiers:
            run.warn("below_tier", f"{self.name} needs a model that {needed}; {profile.name} is not known to")
        return {"route": "body"}

    async def _verify(self, run: RunContext, state: State) -> dict[str, Any]:
        direct = state.get("route") == "direct"
        covered = whole_covered(run.scope, state) if direct else self.covered(run.scope, state)
        return {"answer": await conclude(run, state, covered, "direct" if direct else self.name)}


def _check_question(scope: Scope) -> None:
    """Refuse a question that leaves no room for any text."""
    tokens, output = answer_input(scope, [])
    room = scope.profile.context - output - LEAST
    if tokens > room:
        raise ConfigError(
            f"the question takes {tokens:,} tokens, and {scope.profile.name} has room for {room:,}",
            hint="ask a shorter question, and pass long text as a document",
        )


def reads_directly(scope: Scope) -> bool:
    """True if one call can read everything, prompt and answer inside the reliable window."""
    if scope.task.kind not in ("search", "multi_hop"):
        return False
    if sum(len(d.text) for d in scope.documents.values()) > 16 * scope.profile.window:
        return False  # no tokenizer packs more than 16 characters into a token on average
    tokens, output = answer_input(scope, whole_pieces(scope))
    return tokens + output <= scope.profile.window


def whole_covered(scope: Scope, state: State) -> Covered:
    """Coverage of a direct read: everything or nothing."""
    chunks = scope.whole()
    everything = frozenset(range(len(chunks)))
    failed = bool(state.get("failures"))
    return Covered(
        chunks, read=frozenset() if failed else everything, failed=everything if failed else frozenset()
    )


def add_node(graph: Graph, name: str, step: Step, *, defer: bool = False) -> None:
    """Add a node that runs inside a span of the trace; a deferred one waits for all that is under way."""

    async def node(state: State, runtime: Runtime[RunContext]) -> dict[str, Any]:
        with runtime.context.trace.span(name):
            update = await step(runtime.context, state)
            runtime.context.see(update)
            return update

    # Without it LangGraph would give the node what its annotation names, and not the strategy's own keys.
    graph.add_node(name, node, input_schema=graph.state_schema, defer=defer)


def _route(entry: str) -> Callable[[State], str]:
    def route(state: State) -> str:
        return "direct" if state.get("route") == "direct" else entry

    return route


async def _direct(run: RunContext, state: State) -> dict[str, Any]:
    return await answer_pieces(run, whole_pieces(run.scope))
