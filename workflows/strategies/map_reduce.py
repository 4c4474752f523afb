"""Read every chunk on its own, then combine what the reads noted, as the kind of task wants it.

    cut -> read ×L -> gather -> finish -> verify
                                finish -> finish      a level up, in a tree of merges

Cost: L reads and the calls of the kind's pipeline (`workflows.tasks`). The typed combinators follow
lambda-RLM (recursive language models over typed operators); the cost model is our own, because the published
one makes many times the calls it plans.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from langgraph.types import Send

from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Cost, Failure, Plan
from agentctx.workflows import cost
from agentctx.workflows.call import ask
from agentctx.workflows.conclude import Covered
from agentctx.workflows.cut import Cut, cut
from agentctx.workflows.frame import Graph, Strategy, add_node
from agentctx.workflows.profile import Tier
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.state import Part, Record, State, TaskKind
from agentctx.workflows.tasks.pipeline import Pipeline
from agentctx.workflows.tasks.table import KINDS, pipeline

SENDS = 512  # LangGraph tasks per superstep; more reads than that travel in batches
GIST_TOKENS = 300  # a model that only reads is given short chunks


@dataclass(frozen=True)
class MapReduce(Strategy):
    """`chunk_tokens` None: as large as the window allows. `quorum`: share of reads that must succeed."""

    name: ClassVar[str] = "map_reduce"
    kinds: ClassVar[tuple[TaskKind, ...]] = tuple(KINDS)
    chunk_tokens: int | None = None
    fan_in: int | None = None
    quorum: float = 0.5
    max_pairs: int = 200

    def __post_init__(self) -> None:
        if self.chunk_tokens is not None and self.chunk_tokens < 64:
            raise ConfigError(f"chunk_tokens must be at least 64, got {self.chunk_tokens}")
        if self.fan_in is not None and self.fan_in < 2:
            raise ConfigError(f"fan_in must be at least 2, got {self.fan_in}")
        if not 0 <= self.quorum <= 1:
            raise ConfigError(f"quorum must be between 0 and 1, got {self.quorum}")
        if self.max_pairs < 1:
            raise ConfigError(f"max_pairs must be at least 1, got {self.max_pairs}")

    def per(self, scope: Scope) -> Part:
        """How the input is divided into named parts."""
        return scope.task.per

    def pipeline(self, scope: Scope) -> Pipeline:
        """What the kind of task reads for."""
        return pipeline(scope.task.kind, self.fan_in, self.max_pairs)

    def needs(self, scope: Scope) -> Tier:
        return self.pipeline(scope).needs

    def cut(self, scope: Scope) -> Cut:
        kind = self.pipeline(scope)
        limit = self.chunk_tokens or (None if scope.profile.writes else GIST_TOKENS)
        return scope.keep(
            (self, "cut"),
            lambda: cut(
                scope, kind.read_role(scope), kind.question(scope), self.per(scope), limit, kind.spare
            ),
        )

    def body_plan(self, scope: Scope) -> Plan:
        kind = self.pipeline(scope)
        made, role = self.cut(scope), kind.read_role(scope)
        inputs = [read.input_tokens for read in made.reads]
        finishing = [stage for stage in kind.stages(scope, made) if stage.cost.calls]
        stages = [cost.stage("read", role.name, inputs, role.max_output, scope.profile), *finishing]
        largest = [max(inputs), role.max_output]
        for stage in finishing:
            largest[0] = max(largest[0], scope.profile.window - largest[1])
            largest[1] = max(largest[1], stage.cost.output_tokens // stage.cost.calls)
        return cost.make_plan(
            self.name,
            {"chunk_tokens": made.chunk_tokens, "reads": len(made.reads), "parts": len(made.parts)},
            stages,
            largest_input=largest[0],
            largest_output=largest[1],
            hold=sum((stage.cost for stage in finishing), Cost()),
            coverage=1.0,
            supersteps=8 + kind.visits(scope, made),
            assumptions=scope.assumptions(reads=True),
        )

    def body(self, graph: Graph) -> str:
        add_node(graph, "cut", self._cut)
        add_node(graph, "read", self._read)
        add_node(graph, "gather", self._gather)
        add_node(graph, "finish", self._finish)
        graph.add_conditional_edges("cut", _fan_out, ["read"])
        graph.add_edge("read", "gather")
        graph.add_edge("gather", "finish")
        graph.add_conditional_edges("finish", lambda state: state["route"], ["finish", "verify"])
        return "cut"

    async def _cut(self, run: RunContext, state: State) -> dict[str, Any]:
        return {"n_reads": len(self.cut(run.scope).reads)}

    async def _read(self, run: RunContext, state: State) -> dict[str, Any]:
        """One batch of reads, each an independent call."""
        made = self.cut(run.scope)
        kind = self.pipeline(run.scope)
        role, question = kind.read_role(run.scope), kind.question(run.scope)
        numbers = range(*state["batch"])

        async def one(number: int) -> tuple[int, Record | Failure]:
            result = await ask(run, role, question, made.pieces(run.scope, made.reads[number]))
            if isinstance(result, Record):
                run.see({"reads": {str(number): result.id}})
            return number, result

        results = await asyncio.gather(*(one(number) for number in numbers))
        return {
            "reads": {str(n): r.id for n, r in results if isinstance(r, Record)},
            "failures": {str(n): asdict(r) for n, r in results if isinstance(r, Failure)},
        }

    async def _gather(self, run: RunContext, state: State) -> dict[str, Any]:
        """All reads are in."""
        done, wanted = len(state.get("reads", {})), len(self.cut(run.scope).reads)
        if done < self.quorum * wanted:
            run.warn("quorum", f"only {done} of {wanted} reads succeeded")
        return {}

    async def _finish(self, run: RunContext, state: State) -> dict[str, Any]:
        update = await self.pipeline(run.scope).finish(run, state, self.cut(run.scope))
        return {"route": "verify", **update}

    def salvage(self, run: RunContext, state: State) -> list[list[Any]]:
        return self.pipeline(run.scope).salvage(run, state, self.cut(run.scope))

    def covered(self, scope: Scope, state: State) -> Covered:
        return self.cut(scope).covered(state)


def _fan_out(state: State) -> list[Send]:
    """At most SENDS tasks, each a contiguous batch of read numbers."""
    reads = state["n_reads"]
    size = -(-reads // SENDS)
    return [Send("read", {"batch": [at, min(at + size, reads)]}) for at in range(0, reads, size)]
